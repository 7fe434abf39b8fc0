"""The path kernel where scikit-learn wants something else than a callable."""
