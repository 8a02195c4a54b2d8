"""Enters: the state of a run as trackable objects, its figures as dicts of floats.
Leaves: checkpoints, metrics.jsonl, summaries, lines on the screen, SavedModels.
Next: nothing; here state leaves the process, or comes back into it.
"""

from mpl.record.checkpoint import Checkpoints
from mpl.record.export import export_saved_model, load_predictor
from mpl.record.metrics_log import MetricsWriter
from mpl.record.progress import Progress
from mpl.record.summaries import Summaries

__all__ = [
    "Checkpoints",
    "MetricsWriter",
    "Progress",
    "Summaries",
    "export_saved_model",
    "load_predictor",
]
