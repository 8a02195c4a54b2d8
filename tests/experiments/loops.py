"""The new loops' mathematics once more: NumPy in float64, gradients by differences."""

import keras
import numpy as np
import tensorflow as tf

import mpl

CASES = [(1, 1), (2, 1), (1, 2), (2, 2)]  # replicas, micro-batches
# Largest error of an update, relative to its size.
ROUNDING = {"float32": 1e-4, "mixed_bfloat16": 0.02, "mixed_float16": 0.004}


def small(units):
    """Returns a network without dropout; `logits` is the same in NumPy."""
    layers = keras.layers
    return keras.Sequential([
        keras.Input((8, 8, 1)), layers.Rescaling(1 / 16), layers.Flatten(),
        layers.Dense(units, activation="tanh"), layers.Dense(10, dtype="float32")])


def prepared(kind, strategy, **settings):
    """Returns an experiment that is set up; its updates are the gradient itself."""
    config = dict(policy="float32", optimizer="sgd", learning_rate=1.0,
                  lr_schedule="constant", global_batch_size=16)
    experiment = kind()
    experiment.setup(kind.Config(**{**config, **settings}), strategy)
    return experiment


def batch_of(experiment):
    """Returns the batch of the first step: images `[n, 64]` from 0 to 1, and labels."""
    batch = next(iter(experiment.pipelines["train"].dataset()))
    return batch["image"].numpy().reshape(-1, 64) / 16, batch["label"].numpy()


def weights_of(model):
    """Returns kernel, bias, kernel, bias."""
    return [tf.convert_to_tensor(variable.value).numpy().astype(np.float64)
            for variable in model.trainable_variables]


def update(experiment, model, steps=1):
    """Returns what steps take from a model's weights."""
    before = weights_of(model)
    experiment.trainer.train(steps)
    return [old - new for old, new in zip(before, weights_of(model))]


def logits(weights, x):
    kernel_1, bias_1, kernel_2, bias_2 = weights
    return np.tanh(x @ kernel_1 + bias_1) @ kernel_2 + bias_2


def log_softmax(values):
    shifted = values - values.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def cross_entropy(weights, x, label):
    """Returns the loss of each example."""
    return -log_softmax(logits(weights, x))[np.arange(len(label)), label]


def slopes(weights, x, label):
    """Returns ∂loss ÷ ∂x of each example, by the chain rule."""
    kernel_1, bias_1, kernel_2, _ = weights
    hidden = np.tanh(x @ kernel_1 + bias_1)
    wrong = np.exp(log_softmax(logits(weights, x))) - np.eye(10)[label]
    return ((wrong @ kernel_2.T) * (1 - hidden**2)) @ kernel_1.T


def gradient(loss, weights, width=1e-5):
    """Returns the gradient of a function of the weights, by central differences."""
    found = []
    for number, value in enumerate(weights):
        part = np.zeros_like(value)
        for index in np.ndindex(value.shape):
            ends = []
            for sign in (1, -1):
                moved = value.copy()
                moved[index] += sign * width
                ends.append(loss([*weights[:number], moved, *weights[number + 1:]]))
            part[index] = (ends[0] - ends[1]) / (2 * width)
        found.append(part)
    return found


def norm(arrays):
    return np.sqrt(sum((array**2).sum() for array in arrays))


def error(got, want):
    """Returns the distance of two lists of arrays, relative to the second's size."""
    return norm([a - b for a, b in zip(got, want, strict=True)]) / norm(want)


def bits(experiment):
    """Returns copies of all master weights."""
    return [tf.convert_to_tensor(bucket.variable).numpy()
            for weights in tf.nest.flatten(experiment.weights)
            for bucket in weights.buckets]


def exploding(output, factor):
    """Returns the output with losses whose gradient is larger by `factor`."""
    @tf.custom_gradient
    def explode(losses):
        return tf.identity(losses), lambda upstream: upstream * factor

    return output._replace(per_example=explode(output.per_example))


def is_skipped(experiment, before):
    """Whether the first step changed nothing but the counters and the scale."""
    report = experiment.train_report()
    counts = report["applied_steps"], report["skipped_steps"], report["loss_scale"]
    return counts == (0, 1, 2.0**14) and all(
        np.array_equal(new, old)
        for old, new in zip(before, bits(experiment), strict=True))


def trained(kind, path, **settings):
    """Returns the test metrics after a short training in mixed_float16."""
    settings = {"train_epochs": 12, **settings}
    return mpl.run(kind, workdir=str(path), policy="mixed_float16",
                   summary_every_steps=0, **settings)["test"]
