"""The mathematics: pure functions on tensors, one equation a file. Imports `core.types` alone."""
