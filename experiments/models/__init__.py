"""Models of the experiments: one module for each kind."""
