"""Enters: examples, as a dict of arrays, files or a `tf.data.Dataset`.
Leaves: batches, or a worker's part of each, in an order of (seed, epoch, position).
Next: `mpl.precision` says in which dtypes they are computed with.
"""

from mpl.data.file_source import FileSource, naming_damage
from mpl.data.pipeline import DataContext, Pipeline, fingerprint, weighted
from mpl.data.ranges import Ranges
from mpl.data.source import ArraySource, DatasetSource, Source, as_source

__all__ = [
    "ArraySource",
    "DataContext",
    "DatasetSource",
    "FileSource",
    "Pipeline",
    "Ranges",
    "Source",
    "as_source",
    "fingerprint",
    "naming_damage",
    "weighted",
]
