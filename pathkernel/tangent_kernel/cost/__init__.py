"""Cost of a kernel matrix on each engine, before it is computed."""
