"""Step times of two replicas over those of one device, at the same global batch.

    python -m experiments.benchmarks.replicas [--works=mlp,cnn] [--policy=float32]

One device and two of a process, by mpl and by Keras's `fit`, in blocks in turn; then
two processes, by themselves. Without GPUs the devices are logical ones of the CPU and
share its cores: what is seen then is what several replicas cost, not what they gain.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import keras
import tensorflow as tf
from absl import app, flags

from experiments.benchmarks import systems, works
from mpl import distribute

ROUNDS, BLOCK_SECS = 7, 1.0
_MARK = "milliseconds of two processes: "

_WORKS = flags.DEFINE_list("works", ["tiny", "mlp", "cnn"], "Names in works.py.")
_POLICY = flags.DEFINE_string("policy", "float32", "A Keras dtype policy.")


class Replicas(systems.Mpl):
    """mpl under a strategy.

    Args:
        work, policy: as of `System`.
        strategy: what runs the steps.
        peers: the processes that train in step.
    """

    def __init__(self, work: str, policy: str, strategy: tf.distribute.Strategy,
                 peers: distribute.Peers | None = None):
        self._strategy, self._peers = strategy, peers or distribute.Peers()
        super().__init__(work, policy, dynamic=False)

    def set_up(self, config) -> None:
        self.experiment.peers = self._peers
        self.experiment.setup(config, self._strategy)


def times(trains: dict[str, Callable[[int], object]]) -> dict[str, list[float]]:
    """Returns milliseconds a step of each, from blocks in turn."""
    for train in trains.values():
        train(2)
    first = next(iter(trains.values()))
    count, secs = 2, 0.0
    while secs < BLOCK_SECS / 2:
        count *= 2
        began = time.perf_counter()
        first(count)
        secs = time.perf_counter() - began
    found: dict[str, list[float]] = {name: [] for name in trains}
    for number in range(-1, ROUNDS):
        for name, train in trains.items():
            began = time.perf_counter()
            train(count)
            if number >= 0:
                found[name].append(1e3 * (time.perf_counter() - began) / count)
    return found


def one_process(work: str, policy: str) -> dict[str, list[float]]:
    """Times one device, two devices, and `fit` on both."""
    one = distribute.get_strategy("one_device")
    two = distribute.get_strategy("mirrored", 2)
    trains: dict[str, Callable[[int], object]] = {
        "mpl, one device": Replicas(work, policy, one).train,
        "mpl, mirrored ×2": Replicas(work, policy, two).train,
    }
    for name, strategy in (("one device", one), ("mirrored ×2", two)):
        with strategy.scope():
            fit = systems.KerasFit(work, policy, dynamic=False)
        fit.steps_per_call = 16
        trains[f"fit, {name}"] = fit.train
    return times(trains)


def as_a_worker(names: Sequence[str], policy: str) -> None:
    """Times this process together with another; the chief prints the times."""
    cluster = distribute.find_cluster()
    with distribute.joined(cluster, 120) as peers:
        strategy = distribute.get_strategy(cluster=cluster)
        for work in names:
            train = Replicas(work, policy, strategy, peers).train
            train(2)
            count = 16
            while True:  # all make blocks of the same length
                began = time.perf_counter()
                train(count)
                if peers.of_chief(time.perf_counter() - began > BLOCK_SECS / 2):
                    break
                count *= 2
            found = []
            for _ in range(ROUNDS):
                began = time.perf_counter()
                train(count)
                found.append(1e3 * (time.perf_counter() - began) / count)
            if peers.is_chief:
                print(_MARK + json.dumps([work, found]), flush=True)


def main(argv: Sequence[str]) -> None:
    del argv
    if "TF_CONFIG" in os.environ:
        return as_a_worker(_WORKS.value, _POLICY.value)
    distribute.get_strategy("mirrored", 2)  # before TensorFlow fixes the devices
    found = {}
    for work in _WORKS.value:
        found[work] = one_process(work, _POLICY.value)
        keras.backend.clear_session()
    module = [sys.executable, "-m", "experiments.benchmarks.replicas"]
    output = subprocess.run(
        [sys.executable, "-m", "mpl.launch.local", "--workers=2", "--", *module,
         f"--works={','.join(_WORKS.value)}", f"--policy={_POLICY.value}"],
        stdout=subprocess.PIPE, text=True, check=True).stdout
    for line in output.splitlines():
        if _MARK in line:
            work, values = json.loads(line.partition(_MARK)[2])
            found[work]["mpl, 2 workers"] = values
    for work, by_name in found.items():
        size = works.WORKS[work].batch_size
        print(f"\n{work}, {_POLICY.value}, global batch {size}: ms a step (min–max)")
        base = statistics.median(by_name["mpl, one device"])
        for name, values in by_name.items():
            median = statistics.median(values)
            print(f"  {name:18} {median:8.3f} ({min(values):.3f}–{max(values):.3f})"
                  f"  ÷ one device {median / base:.2f}")


if __name__ == "__main__":
    app.run(main)
