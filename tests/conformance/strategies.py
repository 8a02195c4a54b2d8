"""The same trainings under any strategy; as a program, in one process of a cluster.

    python tests/conformance/strategies.py SAVED FOLDER     # with TF_CONFIG

Each case trains 20 steps, over the end of an epoch with its padded batch, without
dropout, then 20 with poisoned examples, in the same trace, and returns what must not
depend on the strategy. Parameter servers have one worker here, which makes steps one
after another.
"""

import itertools
import pathlib
import sys

import keras
import numpy as np
import tensorflow as tf

import mpl
from mpl import distribute
from mpl.data import ArraySource, Pipeline
from mpl.record.checkpoint import Checkpoints

STEPS, BATCH, EXAMPLES = 20, 16, 252  # 16 batches an epoch, the last of 12 examples
POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")
ACCUMULATE = (1, 4)
SEED = 1
# Examples with an infinite gradient, by their number in the data: in a GAN 1 that of
# the discriminator, -1 of the generator.
POISONED = {68: 1, 222: -1, 170: -1, 48: 1, 246: -1, 105: 1, 198: -1, 122: 1}
layers = keras.layers


def data(split, poisoned={}):
    random = np.random.default_rng(("train", "validation").index(split))
    image = random.normal(size=(EXAMPLES, 6, 6, 1)).astype(np.float32)
    poison = np.zeros(EXAMPLES, np.float32)
    poison[list(poisoned)] = list(poisoned.values())
    weight = random.uniform(0.5, 2.0, EXAMPLES).astype(np.float32)
    return {"image": image, "label": (image.sum((1, 2, 3)) > 0).astype(np.int32),
            "poison": poison, "weight": weight}


def started(model):
    """Gives a model the same weights in every dtype."""
    random = np.random.default_rng(5)
    model.set_weights([
        value if value.ndim < 2 else 0.3 * random.normal(size=value.shape)
        for value in model.get_weights()])
    return model


@tf.custom_gradient
def exploding(losses, bad):
    """Returns the losses; where `bad`, their gradient is infinite."""
    def gradient(upstream):
        return tf.where(bad, tf.constant(np.inf, upstream.dtype), upstream), None

    return tf.identity(losses), gradient


def counted(losses):
    """Returns what a metric of the examples that were seen reads; they have weights."""
    return {"examples": (tf.ones_like(losses),)}


def poisoned():
    """Returns the training data with poison, in the order of an experiment's own."""
    return Pipeline(ArraySource(data("train", POISONED)), global_batch_size=BATCH,
                    seed=SEED, shuffle=True, repeat=True)


class Plain(mpl.Experiment):
    """A small classifier."""

    layer_dtype = "float32"

    def build_data(self, split, context):
        return None if split == "test" else data(split)

    def build_model(self):
        return started(keras.Sequential([
            keras.Input((6, 6, 1)), layers.Conv2D(8, 3, activation="tanh"),
            layers.LayerNormalization(), layers.Flatten(),
            layers.Dense(16, activation="tanh", kernel_regularizer="l2"),
            layers.Dense(2, dtype=self.layer_dtype)]))

    def build_optimizer(self, config):
        return keras.optimizers.SGD(0.1, momentum=0.9)

    def loss(self, batch, training):
        logits = self.model(batch["image"], training=training)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(batch["label"], logits)
        losses = exploding(losses, batch["poison"] != 0)
        outputs = {"accuracy": (batch["label"], logits), **counted(losses)}
        return mpl.LossOutput(losses, batch["weight"], outputs)

    def metrics(self):
        return {"accuracy": keras.metrics.SparseCategoricalAccuracy(),
                "examples": keras.metrics.Sum()}


class Small(Plain):
    """In several buckets."""

    def build_weights(self, model):
        return mpl.MasterWeights(model, self.policy, bucket_mb=1e-3)


class Gan(Plain):
    """Two models, two optimizers, two calls of `strategy.run` a step.

    Each update decides for itself; the scale adjusts once for both.
    """

    accumulates = True

    def build_model(self):
        code, image = keras.Input((36,)), keras.Input((6, 6, 1))
        fake = layers.Dense(36, dtype=self.layer_dtype)(
            layers.Dense(16, activation="tanh")(code))
        verdict = layers.Dense(1, dtype=self.layer_dtype)(
            layers.Dense(16, activation="tanh")(layers.Flatten()(image)))
        generator = keras.Model(code, layers.Reshape((6, 6, 1))(fake))
        return {"generator": started(generator),
                "discriminator": started(keras.Model(image, verdict))}

    def train_step(self, iterator):
        batch = next(iterator)
        for name in ("discriminator", "generator"):
            self.strategy.run(self.update, args=(batch, name))

    def update(self, batch, name):
        weights, optimizer = self.weights[name], self.optimizer[name]
        params = weights.cast()

        def forward_of(batch, state):
            with tf.GradientTape() as tape:
                tape.watch(params)
                with weights.bound(params, state) as forward:
                    output = self.adversarial_loss(batch, name)
                    scaled = optimizer.scale_loss(output, forward)
            return weights.gradients(tape, scaled, forward), forward, output

        # The model that is not trained reads its masters.
        other = self.weights[{"generator": "discriminator"}.get(name, "generator")]
        with other.bound(other.cast()):
            gradients, forward, output = mpl.accumulate(
                forward_of, batch, self.config.accumulate_steps, weights=weights)
        optimizer.apply(gradients, forward)
        if name == "generator":
            self.update_metrics(output, forward)

    def adversarial_loss(self, batch, name):
        def judge(image):
            verdict = self.model["discriminator"](tf.cast(image, self.layer_dtype))
            return tf.cast(verdict[:, 0], self.layer_dtype)

        on_fake = judge(self.model["generator"](layers.Flatten()(batch["image"])))
        losses, sign = tf.nn.softplus(-on_fake), -1
        if name == "discriminator":
            losses = tf.nn.softplus(on_fake) + tf.nn.softplus(-judge(batch["image"]))
            sign = 1
        losses = exploding(losses, batch["poison"] == sign)
        return mpl.LossOutput(losses, batch["weight"], counted(losses))

    def loss(self, batch, training):  # of evaluation
        return self.adversarial_loss(batch, "generator")

    def metrics(self):
        return {"examples": keras.metrics.Sum()}


KINDS = {kind.__name__: kind for kind in (Plain, Small, Gan)}
CASES = [*itertools.product(("Plain", "Gan"), POLICIES, ACCUMULATE)]


def prepared(kind, policy, accumulate, strategy, peers=distribute.Peers(), **settings):
    """Returns an experiment of a case, set up."""
    keras.backend.clear_session()
    experiment = KINDS[kind]()
    if policy == "float64":
        experiment.layer_dtype = "float64"
    config = mpl.RunConfig(
        policy=policy, accumulate_steps=accumulate, global_batch_size=BATCH,
        train_steps=STEPS, clip_norm=1.0, ema_decay=0.9, seed=SEED, **settings)
    experiment.peers = peers
    experiment.setup(config, strategy)
    return experiment


def outcome(experiment):
    """Returns weights, averages, counts and metrics of an experiment, as arrays.

    Evaluation is without micro-batches, so it is left out where training has some.
    """
    result = {}
    for part in sorted(experiment.weights) if isinstance(
            experiment.weights, dict) else [""]:
        weights = experiment.weights[part] if part else experiment.weights
        optimizer = experiment.optimizer[part] if part else experiment.optimizer
        for kind, values in (("weight", None), ("average", optimizer.averages)):
            for key, value in weights.by_key(values).items():
                result[f"{kind} {part}{key}"] = value.numpy()
        for name in ("applied_steps", "skipped_steps"):
            result[f"{name} {part}"] = getattr(optimizer, name).numpy()
    result["step"] = experiment.global_step.numpy()
    result["scale"] = experiment.loss_scale.value.numpy()
    reports = {"train": experiment.train_report()}
    if experiment.config.accumulate_steps == 1:
        evaluator = experiment.evaluators["validation"]
        reports["validation"] = evaluator.evaluate(-1)
    for split, values in reports.items():
        for name in ("loss", "accuracy", "examples"):
            if name in values:
                result[f"{split} {name}"] = np.float32(values[name])
    return result


def train(kind, policy, accumulate, strategy, peers=distribute.Peers(), **settings):
    """Trains a case; returns its `outcome`, and that of what follows with poison."""
    experiment = prepared(kind, policy, accumulate, strategy, peers, **settings)
    experiment.trainer.train(STEPS // 2)
    experiment.trainer.train(STEPS - STEPS // 2)
    result = outcome(experiment)
    experiment.pipelines["train"] = poisoned()
    experiment.trainer.reset_iterator()
    experiment.trainer.train(STEPS)
    after = outcome(experiment)
    return result | {f"poisoned {name}": value for name, value in after.items()}


def restored(path, strategy, peers=distribute.Peers()):
    """Returns the `outcome` of 3 more steps from a checkpoint, in smaller buckets."""
    experiment = prepared("Small", "float32", 1, strategy, peers)
    assert len(experiment.weights.buckets) > 1
    Checkpoints(path, **experiment.checkpoint_objects()).resume()
    experiment.after_restore()
    experiment.trainer.train(3)
    return outcome(experiment)


def save(path, strategy, peers=distribute.Peers()):
    """Trains 20 steps and writes a checkpoint."""
    experiment = prepared("Plain", "float32", 1, strategy, peers)
    experiment.trainer.train(STEPS)
    objects = experiment.checkpoint_objects()
    Checkpoints(
        path, writes=peers.is_chief, asynchronous=False, **objects).save(STEPS)
    peers.share(None)  # it is written


def main(saved, folder):
    """Trains all cases as one process; the chief writes the outcomes.

    Args:
        saved: folder with checkpoints to go on from.
        folder: for the outcomes, and a checkpoint.
    """
    cluster = distribute.find_cluster()
    servers = cluster if cluster.has_servers else None
    if servers and servers.job != "chief":
        return distribute.serve(servers, 120)
    with (
        distribute.coordinating(servers, 120),
        distribute.joined(None if servers else cluster, 120) as peers,
    ):
        strategy = distribute.get_strategy(cluster=cluster)
        results = {"-".join(map(str, case)): (train, *case) for case in CASES}
        for name in ("mirrored", "one_device"):
            results[f"restored {name}"] = restored, saved / name
        for name, (function, *arguments) in results.items():
            result = function(*arguments, strategy, peers)
            if peers.is_chief:
                np.savez(folder / f"{name}.npz", **result)
        save(folder / "saved", strategy, peers)


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:]))
