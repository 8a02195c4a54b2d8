"""Optimizers that Keras lacks: one module a rule."""
