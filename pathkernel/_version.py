"""The version of the package, which headers of stores and the command line name without importing its public face."""

__version__ = "0.1.0"
