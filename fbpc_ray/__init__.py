"""Function-space Bayesian pseudocoresets on Ray. Importing this package imports nothing heavy and does no work."""

__version__ = "0.1.0"
