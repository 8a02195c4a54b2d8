"""Enters: examples, as a dict of arrays or a `tf.data.Dataset`.
Leaves: global batches in an order that is a function of (seed, epoch, position).
Next: `mpl.precision` says in which dtypes they are computed with.
"""

from mpl.data.pipeline import DataContext, Pipeline, weighted
from mpl.data.source import ArraySource, DatasetSource, Source, as_source

__all__ = [
    "ArraySource",
    "DataContext",
    "DatasetSource",
    "Pipeline",
    "Source",
    "as_source",
    "weighted",
]
