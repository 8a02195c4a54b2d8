"""Enters: the name of a strategy, a number of devices, and what the environment tells.
Leaves: a `tf.distribute.Strategy`, global batches dealt to its replicas, and the peers.
Next: `mpl.data` makes those global batches.
"""

from mpl.distribute.cluster import Cluster, find_cluster
from mpl.distribute.devices import configure, report
from mpl.distribute.parameter_server import check_server_settings, coordinating, serve
from mpl.distribute.peers import Peers, joined
from mpl.distribute.strategy import (
    check_batch,
    choose,
    distribute_dataset,
    get_strategy,
    reason,
)

__all__ = [
    "Cluster",
    "Peers",
    "check_batch",
    "check_server_settings",
    "choose",
    "configure",
    "coordinating",
    "distribute_dataset",
    "find_cluster",
    "get_strategy",
    "joined",
    "reason",
    "report",
    "serve",
]
