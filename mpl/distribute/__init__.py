"""Enters: the name of a strategy and a number of devices.
Leaves: a `tf.distribute.Strategy`, and global batches dealt to its replicas.
Next: `mpl.data` makes those global batches.
"""

from mpl.distribute.strategy import check_batch, distribute_dataset, get_strategy

__all__ = ["check_batch", "distribute_dataset", "get_strategy"]
