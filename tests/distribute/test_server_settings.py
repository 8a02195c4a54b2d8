"""Settings that parameter servers cannot give are refused before anything is made."""

import pytest

from mpl.distribute import Cluster
from mpl.errors import ConfigError
from mpl.experiment import Experiment
from mpl.launch import app
from mpl.launch.config import RunConfig

REFUSED = [
    ("reduce_dtype", "compute", "`reduce_dtype` (compute) does not go with `strategy` "
     "parameter_server: nothing is summed.\nUse --reduce_dtype=float32."),
    ("bucket_mb", 8, "`bucket_mb` (8) does not go with `strategy` parameter_server: no "
     "variables are packed.\nUse --bucket_mb=32, the default."),
    ("deterministic", True, "`deterministic` (True) does not go with `strategy` "
     "parameter_server: workers write as they come.\nLeave it out, or use --strategy="
     "multi_worker_mirrored, in a cluster without ps."),
]  # fmt: skip
JOBS = {"chief": ["a:1"], "worker": ["b:1"], "ps": ["c:1"]}


class Empty(Experiment):
    """Nothing of it may be called."""


@pytest.mark.parametrize(("name", "value", "message"), REFUSED)
@pytest.mark.parametrize("strategy", ["auto", "parameter_server"])
def test_the_chief_refuses_before_there_is_a_strategy(
    strategy, name, value, message, tmp_path
):
    config = RunConfig(strategy=strategy, workdir=str(tmp_path), **{name: value})
    with pytest.raises(ConfigError) as error:
        app.check_before(Empty(), config, None, Cluster(JOBS, "chief", 0))
    assert str(error.value) == message


@pytest.mark.parametrize(("name", "value", "_"), REFUSED)
def test_without_servers_they_are_taken(name, value, _, tmp_path):
    config = RunConfig(workdir=str(tmp_path), **{name: value})
    workers = Cluster({"worker": ["a:1", "b:1"]}, "worker", 0)
    for cluster in (None, workers):
        assert app.check_before(Empty(), config, None, cluster) is None


def test_the_defaults_go_with_servers(tmp_path):
    config, cluster = RunConfig(workdir=str(tmp_path)), Cluster(JOBS, "chief", 0)
    assert app.check_before(Empty(), config, None, cluster) is None
