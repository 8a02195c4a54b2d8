"""Models that experiments share: one module each."""
