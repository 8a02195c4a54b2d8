"""Enters: gradients of a scaled loss on every replica.

Leaves: float32 master weights updated on all replicas alike, or a step skipped.
Next: `mpl.loop`, which runs many such steps.
"""
