"""The tangent kernel at one θ: what it is of (outputs), and how it is computed (engines)."""
