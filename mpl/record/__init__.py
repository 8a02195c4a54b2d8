"""Enters: the state of a run as trackable objects, its figures as dicts of floats.
Leaves: checkpoints, metrics.jsonl, lines on the screen, SavedModels.
Next: nothing; here state leaves the process, or comes back into it.
"""

from mpl.record.checkpoint import Checkpoints
from mpl.record.export import SavedPredictor, export_saved_model
from mpl.record.goodput import Goodput
from mpl.record.metrics_log import MetricsWriter
from mpl.record.pretrained import init_from
from mpl.record.progress import Progress

__all__ = [
    "Checkpoints",
    "Goodput",
    "MetricsWriter",
    "Progress",
    "SavedPredictor",
    "export_saved_model",
    "init_from",
]
