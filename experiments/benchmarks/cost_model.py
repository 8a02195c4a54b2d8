"""Fits step time = fixed + bytes ÷ bandwidth + latency × buckets on this machine.

    python -m experiments.benchmarks.cost_model

takes a minute or two on two cores. It measures, in one process: one small operation;
the update alone, by mpl's optimizer on one device; the sum over 2, 3 and 4 replicas
that share the cores, which is the host's cost and no network's. docs/cost_model.md has
the meaning of the constants, and extends them on paper.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

import mpl

_BLOCKS = 9
_OPERATIONS = 500
_REDUCTIONS = 4  # one after the other in a call
_REPLICAS = (2, 3, 4)
_KIB, _MIB = 2**10, 2**20
# Bytes and buckets. `mpl.step.fused` has one operation for a bucket of 128 KiB or more.
_UPDATES = {
    "buckets below 128 KiB": [
        (16 * _KIB, 1), (64 * _KIB, 1), (64 * _KIB, 8), (64 * _KIB, 64),
        (512 * _KIB, 8), (512 * _KIB, 64), (_MIB, 64), (4 * _MIB, 64)],
    "buckets of 128 KiB or more": [
        (_MIB, 1), (_MIB, 8), (4 * _MIB, 32), (16 * _MIB, 64), (64 * _MIB, 64),
        *((size * _MIB, count) for size in (4, 16, 64) for count in (1, 8))],
}
_REDUCED = [(size, count) for size in (64 * _KIB, _MIB, 4 * _MIB, 16 * _MIB, 64 * _MIB)
            for count in (1, 8, 64)]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One measured time.

    Attributes:
      num_bytes: of all float32 parameters, or of what is reduced.
      buckets: how many share them equally.
      secs: of the quickest block: others take turns on the cores.
    """

    num_bytes: int
    buckets: int
    secs: float


@dataclasses.dataclass(frozen=True)
class Constants:
    """What `fit` finds.

    Attributes:
      fixed_secs: what neither bytes nor buckets change.
      bytes_per_sec: bandwidth.
      latency_secs: of one bucket.
      residuals: (measured - predicted) ÷ measured, one a sample.
    """

    fixed_secs: float
    bytes_per_sec: float
    latency_secs: float
    residuals: tuple[float, ...] = ()

    def predict(self, num_bytes: float, buckets: int) -> float:
        """Returns seconds."""
        fixed, latency = self.fixed_secs, self.latency_secs
        return fixed + num_bytes / self.bytes_per_sec + latency * buckets


def fit(samples: Sequence[Sample]) -> Constants:
    """Returns the constants with the least sum of squared relative residuals."""
    secs = np.array([sample.secs for sample in samples])
    # GB, not bytes: columns of like size. Relative, else the largest alone would count.
    columns = np.array([[1.0, s.num_bytes / 1e9, s.buckets] for s in samples])
    relative, ones = columns / secs[:, None], np.ones(len(secs))
    solved = np.linalg.lstsq(relative, ones, rcond=None)[0]
    if solved[0] < 0:  # no time
        solved = np.append(0, np.linalg.lstsq(relative[:, 1:], ones, rcond=None)[0])
    residuals = tuple(float(r) for r in ones - relative @ solved)
    fixed, per_gb, latency = map(float, solved)
    return Constants(fixed, 1e9 / per_gb, latency, residuals)


def operation_secs() -> float:
    """Returns the seconds of one operation on eight numbers, in a chain of them."""
    @tf.function
    def chain(x, y, num_steps):
        for _ in tf.range(num_steps):
            for _ in range(_OPERATIONS):
                x = x * y
        return x

    ones = tf.ones([8])
    return _secs(lambda n: chain(ones, ones, tf.constant(n)), 20) / _OPERATIONS


def update_secs(num_bytes: int, variables: int, packed: bool = False) -> float:
    """Returns the seconds of one update by Adam, its gradients given."""
    module = tf.Module()
    zeros = tf.zeros([num_bytes // 4 // variables])
    module.weights = [tf.Variable(zeros) for _ in range(variables)]
    weights = mpl.MasterWeights(module, "float32", pack_below=packed * num_bytes)
    optimizer = mpl.LossScaleOptimizer(keras.optimizers.Adam(1e-6), "none", weights)
    params = weights.cast()
    with weights.bound(params) as forward:
        optimizer.scale_loss(mpl.LossOutput(tf.ones([1]), tf.ones([1])), forward)
    gradients = [1e-3 * tf.ones(param.shape) for param in params]

    @tf.function
    def update(num_steps):
        for _ in tf.range(num_steps):
            optimizer.apply(gradients, forward)

    return _secs(lambda n: update(tf.constant(n)), 2 + 2**21 // num_bytes * 10)


def reduce_secs(replicas: int, num_bytes: int, buckets: int) -> float:
    """Returns the seconds to sum all buckets over replicas, as a step does."""
    devices = [f"CPU:{number}" for number in range(replicas)]
    strategy = tf.distribute.MirroredStrategy(
        devices, cross_device_ops=tf.distribute.ReductionToOneDevice())
    values = [1e-3 * tf.ones([num_bytes // 4 // buckets]) for _ in range(buckets)]

    def replica():
        context = tf.distribute.get_replica_context()
        summed = values
        for _ in range(_REDUCTIONS):
            summed = [context.all_reduce(tf.distribute.ReduceOp.SUM, v) for v in summed]
        return summed

    reduce = tf.function(lambda: strategy.run(replica), autograph=False)

    def repeat(count):
        for _ in range(count):
            out = reduce()
        return strategy.experimental_local_results(out[0])[0]

    return _secs(repeat, 2 + 2**20 // num_bytes * 5) / _REDUCTIONS


def _secs(run: Callable, count: int) -> float:
    """Returns the seconds of one of `count` repetitions, in the quickest block."""
    def block():
        began = time.perf_counter()
        if (result := run(count)) is not None:
            result.numpy()
        return (time.perf_counter() - began) / count

    return min(block() for _ in range(1 + _BLOCKS))  # the first traces


def _show(name: str, samples: Sequence[Sample]) -> None:
    found = fit(samples)
    errors = sorted(map(abs, found.residuals))
    print(f"\n{name}: fixed {found.fixed_secs * 1e6:.0f} µs, bandwidth "
          f"{found.bytes_per_sec / 1e9:.2f} GB/s, latency "
          f"{found.latency_secs * 1e6:.1f} µs a bucket; residuals: median "
          f"{statistics.median(errors):.0%}, largest {errors[-1]:.0%}\n"
          f"| KiB | buckets | measured µs | predicted µs | residual |\n{'|---' * 5}|")
    for sample, residual in zip(samples, found.residuals):
        predicted = found.predict(sample.num_bytes, sample.buckets)
        print(f"| {sample.num_bytes // _KIB} | {sample.buckets} | "
              f"{sample.secs * 1e6:.0f} | {predicted * 1e6:.0f} | {residual:+.0%} |")


def main() -> None:
    logical = [tf.config.LogicalDeviceConfiguration()] * max(_REPLICAS)
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, logical)
    print(f"one small operation: {operation_secs() * 1e6:.2f} µs")
    for name, sizes in _UPDATES.items():
        _show(f"update, {name}", [Sample(*key, update_secs(*key)) for key in sizes])
    print(f"64 variables, 1 MiB, packed: {update_secs(_MIB, 64, True) * 1e6:.0f} µs")
    for replicas in _REPLICAS:
        samples = [Sample(*key, reduce_secs(replicas, *key)) for key in _REDUCED]
        _show(f"reduction over {replicas} replicas of one host", samples)


if __name__ == "__main__":
    main()
