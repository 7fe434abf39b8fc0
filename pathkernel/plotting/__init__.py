"""Pictures of kernels and attributions: Display objects in scikit-learn's manner, and the report page."""
