"""Models that several programs train: one module a model."""
