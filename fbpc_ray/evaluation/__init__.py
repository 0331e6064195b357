"""SGHMC chains on a coreset, ensembles of their samples, scores. Imports core to models."""
