"""Predictions with an experiment's weights: here, and from a SavedModel."""

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from mpl import data as data_lib
from mpl.precision import cast as cast_lib
from mpl.precision import policy as policy_lib
from mpl.record import export as export_lib


def predictor(experiment: Any) -> Callable[[Mapping[str, np.ndarray]], Any]:
    """Returns a function from a dict of arrays `[n, ...]` to predictions `[n, ...]`.

    Shapes are static, as in training, and few, so that little is traced: what is less
    than a global batch is filled up to 1, 4, 16 ... examples a replica.
    """
    strategy, most = experiment.strategy, experiment.config.global_batch_size
    replicas = strategy.num_replicas_in_sync // experiment.shard["num_shards"]
    deal = strategy.experimental_distribute_values_from_function

    @tf.function
    def predict_batch(batch: Mapping[str, tf.Tensor], real: tf.Tensor) -> Any:
        def replica_predict(batch, real):
            with experiment.bound_for_inference():
                outputs = experiment.predict(data_lib.weighted(batch, real))
            return cast_lib.cast_floating(outputs, tf.float32)

        return strategy.run(replica_predict, args=(batch, real))

    def predict(examples: Mapping[str, np.ndarray]) -> Any:
        source = data_lib.ArraySource(dict(examples))
        count, size = source.num_examples, replicas
        while size < min(count, most):
            size = min(4 * size, most)

        def load(start: int, context: Any) -> Any:
            index = np.arange(start, start + size).reshape([replicas, -1])
            index = index[context.replica_id_in_sync_group]
            with tf.device("CPU:0"):  # where the arrays lie
                return source.gather(index % count), tf.constant(index < count)

        parts = [
            predict_batch(*deal(functools.partial(load, start)))
            for start in range(0, count, size)
        ]

        def joined(*leaves: Any) -> np.ndarray:
            copies = map(strategy.experimental_local_results, leaves)
            return np.concatenate([*itertools.chain(*copies)])[:count]

        return tf.nest.map_structure(joined, *parts)

    return predict


def export(experiment: Any, path: str, weights_dtype: str) -> str:
    """Writes a SavedModel of `experiment.predict` (see `Experiment.export`)."""
    in_float32 = weights_dtype == "float32"
    twin = twin_of(experiment, "float32" if in_float32 else experiment.policy)
    everything = tf.nest.flatten(twin.weights)
    holder = tf.Module()
    holder.params = [
        [tf.Variable(value, trainable=False) for value in weights.cast()]
        for weights in everything
    ]
    holder.others = [weights.untrained for weights in everything]

    def predict(features: Mapping[str, tf.Tensor]) -> Any:
        with contextlib.ExitStack() as stack:
            for weights, params in zip(everything, holder.params):
                values = [tf.convert_to_tensor(param) for param in params]
                stack.enter_context(weights.bound(values))
            return cast_lib.cast_floating(twin.predict(features), tf.float32)

    info = {
        "experiment": experiment.name,
        "policy": twin.policy.name,
        "weights": weights_dtype,
        "step": int(experiment.global_step.numpy()),
        "metrics": list(experiment.metrics()),
    }
    return export_lib.export_saved_model(
        holder, predict, _features(experiment, twin), path,
        run=experiment.name, info=info,
    )


def twin_of(experiment: Any, policy: policy_lib.Policy | str) -> Any:
    """Returns the experiment with the same weights under another policy.

    It lives under no strategy; averages, where the run keeps them, are its weights.
    """
    twin = copy.copy(experiment)
    twin.strategy = tf.distribute.get_strategy()
    twin.policy = policy_lib.get_policy(policy)
    twin.build()
    pairs = zip(tf.nest.flatten(twin.weights), tf.nest.flatten(experiment.optimizer))
    for new, optimizer in pairs:
        for variable, original in zip(new.untrained, optimizer.weights.untrained):
            variable.assign(tf.cast(original, variable.dtype))
        trained = optimizer.weights.by_key(optimizer.averages)
        for entry in new.entries:
            entry.value.assign(tf.cast(trained[entry.key], entry.value.dtype))
        new.build()
    return twin


def _features(experiment: Any, twin: Any) -> dict[str, tf.TensorSpec]:
    """Returns the specs of the features that `predict` reads, without the batch."""
    specs = experiment.pipelines["train"].dataset().element_spec
    read = _Read()

    @tf.function
    def probe(batch):
        read.update(batch)
        twin.predict(read)

    probe.get_concrete_function({
        name: tf.TensorSpec([None, *spec.shape[1:]], spec.dtype)
        for name, spec in specs.items()})
    names = read.names or set(specs) - {"weight"}
    return {
        name: tf.TensorSpec(specs[name].shape[1:], specs[name].dtype)
        for name in sorted(names)
    }


class _Read(dict):
    """A batch that remembers which of its features were read."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default

    def keys(self) -> Any:
        self.names.update(super().keys())
        return super().keys()

    def __iter__(self) -> Any:
        return iter(self.keys())

    def items(self) -> Any:
        return [(name, self[name]) for name in self.keys()]
