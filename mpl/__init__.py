"""mpl: explicit mixed-precision training loops for TensorFlow, without Keras fit."""

from mpl.errors import CheckpointError, ClusterError, ConfigError, NonFiniteError

__version__ = "0.1.0"
__all__ = ["CheckpointError", "ClusterError", "ConfigError", "NonFiniteError"]
