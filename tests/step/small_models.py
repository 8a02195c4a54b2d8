"""Small models and one training step by hand, shared by the tests of the step."""

import keras
import numpy as np
import tensorflow as tf

from mpl.precision import policy as policy_lib
from mpl.step import loss_scale_optimizer, master_weights, state

CLASSES = 3


def image_model(dropout=0.2, batch_norm=True, l2=1e-3, activity_l2=1e-3,
                head="float32"):
    """A CNN with what makes a step hard: statistics, seeds, penalties, islands."""
    layers, regularizer = keras.layers, keras.regularizers.L2
    stack = [
        keras.Input((6, 6, 1)),
        layers.Conv2D(4, 3, kernel_regularizer=regularizer(l2) if l2 else None),
    ]
    if batch_norm:
        stack.append(layers.BatchNormalization())
    stack += [
        layers.ReLU(),
        layers.Conv2D(4, 3, activity_regularizer=(
            regularizer(activity_l2) if activity_l2 else None)),
        layers.LayerNormalization(),
        layers.Flatten(),
    ]
    if dropout:
        stack.append(layers.Dropout(dropout, seed=7))
    stack += [layers.Dense(8, activation="relu"), layers.Dense(CLASSES, dtype=head)]
    return keras.Sequential(stack)


def image_batch(size=8, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.normal(size=(size, 6, 6, 1)).astype(np.float32),
        "label": rng.integers(0, CLASSES, size).astype(np.int32),
        "weight": np.ones(size, np.float32),
    }


class Step:
    """A model, its weights and optimizer, and a step with an injection point."""

    def __init__(self, strategy, policy="float32", *, make_model=image_model,
                 inner=None, loss_scale="auto", clip_norm=None, ema_decay=None,
                 nominal_weight=8.0, reduce_dtype=tf.float32, accumulate=1, seed=0,
                 **weights_kwargs):
        keras.utils.set_random_seed(seed)
        self.strategy = strategy
        self.accumulate = accumulate
        policy = policy_lib.get_policy(policy)
        with strategy.scope():
            with policy.scope():
                self.model = make_model()
            self.weights = master_weights.MasterWeights(
                self.model, policy, **weights_kwargs)
            self.optimizer = loss_scale_optimizer.LossScaleOptimizer(
                inner() if inner else keras.optimizers.SGD(0.1, momentum=0.9),
                loss_scale, self.weights, clip_norm=clip_norm, ema_decay=ema_decay,
                nominal_weight=nominal_weight, reduce_dtype=reduce_dtype)
        self.traces = 0
        self._run = tf.function(self._step)

    def loss(self, batch):
        logits = self.model(batch["image"], training=True)
        losses = keras.losses.sparse_categorical_crossentropy(
            batch["label"], logits, from_logits=True)
        return state.LossOutput(losses, batch["weight"], (batch["label"], logits))

    def _step(self, batch, bad):
        self.traces += 1

        def replica_step(batch, bad):
            params = self.weights.cast()

            def replica_forward(batch, carried):
                with tf.GradientTape() as tape:
                    tape.watch(params)
                    with self.weights.bound(params, carried) as forward:
                        output = self.loss(batch)
                    scaled = self.optimizer.scale_loss(output, forward)
                gradients = self.weights.gradients(tape, scaled, forward)
                return gradients, forward, output

            gradients, forward, _ = loss_scale_optimizer.gradients_lib.accumulate(
                replica_forward, batch, self.accumulate, weights=self.weights)
            first = gradients[0]
            if isinstance(first, tf.IndexedSlices):
                gradients[0] = tf.IndexedSlices(
                    first.values + tf.cast(bad, first.values.dtype), first.indices,
                    first.dense_shape)
            else:
                gradients[0] = first + tf.cast(bad, first.dtype)
            self.optimizer.apply(gradients, forward)
            return forward.loss

        return self.strategy.run(replica_step, args=(batch, bad))

    def _arguments(self, batch, bad=None):
        """Splits a global batch over the replicas, in order."""
        replicas = self.strategy.num_replicas_in_sync
        bad = np.zeros(replicas, np.float32) if bad is None else np.asarray(bad)
        parts = [
            {key: np.array_split(value, replicas)[r] for key, value in batch.items()}
            for r in range(replicas)]
        if replicas == 1:
            return tf.nest.map_structure(tf.constant, (parts[0], np.float32(bad[0])))
        distribute = self.strategy.experimental_distribute_values_from_function
        return (
            distribute(lambda context: tf.nest.map_structure(
                tf.constant, parts[context.replica_id_in_sync_group])),
            distribute(lambda context: tf.constant(
                bad[context.replica_id_in_sync_group], tf.float32)))

    def __call__(self, batch, bad=None):
        """Runs a step on a global batch; `bad[r]` is added to replica r's gradient."""
        loss = self._run(*self._arguments(batch, bad))
        return float(self.strategy.experimental_local_results(loss)[0])

    def concrete(self, batch):
        """Returns the traced step, to look at its graph."""
        return self._run.get_concrete_function(*self._arguments(batch))

    def everything(self):
        """Returns masters, slots, averages and state, every replica's copy."""
        variables = [bucket.variable for bucket in self.weights.buckets]
        variables += [v.value for v in self.optimizer.inner.variables]
        variables += self.optimizer.averages
        variables += [entry.value for entry in self.weights.state]
        variables += [entry.value for entry in self.weights.assigned]
        return [copy.numpy() for variable in variables
                for copy in self.strategy.experimental_local_results(variable)]

    def masters(self):
        """Returns the trainable variables by key."""
        self.weights.publish()
        return {entry.key: entry.value.numpy() for entry in self.weights.entries}
