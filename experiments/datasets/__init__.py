"""Data of the experiments: one module a set, each with `load(split)`."""
