"""What one forward pass takes in and leaves behind."""

import dataclasses
import typing

import tensorflow as tf

from mpl import errors


class LossOutput(typing.NamedTuple):
    """What `Experiment.loss` returns.

    Attributes:
      per_example: float32 `[batch, ...]`, one loss for each example (or token).
      weights: float32, the shape of `per_example`: how much each counts, with 0 for
        padding; `batch["weight"]` in an experiment.
      outputs: what metrics read: `(labels, predictions)` for every metric, or a dict
        from metric name to such a tuple. Floating leaves are float32.
    """

    per_example: tf.Tensor
    weights: tf.Tensor
    outputs: typing.Any = None


@dataclasses.dataclass(eq=False)
class Forward:
    """What a forward pass left, from `MasterWeights.bound` to the end of the step.

    Attributes:
      params: the bound tensors, one a bucket.
      slices: the tensor that each trainable variable was read as.
      state: new values of the model's non-trainable state, one for each of
        `MasterWeights.state`; None where the forward pass wrote nothing.
      snapshot: values to put back on a skipped step, for state assigned in place.
      penalties: scalars the model added with `add_loss`.
      scale: the loss scale of this step, float32 scalar.
      loss_sum: Σ loss × weight on this replica.
      weight_sum: Σ weight on this replica.
      loss: Σ loss × weight ÷ Σ weight over all replicas; set by `apply`.
      finite: whether the step was applied or skipped; set by `apply`.
    """

    params: list[tf.Tensor | tf.Variable]
    slices: list[tf.Tensor | tf.Variable]
    state: list[tf.Tensor | None] = dataclasses.field(default_factory=list)
    snapshot: list[tf.Tensor] = dataclasses.field(default_factory=list)
    penalties: list[tf.Tensor] = dataclasses.field(default_factory=list)
    scale: tf.Tensor | None = None
    loss_sum: tf.Tensor | None = None
    weight_sum: tf.Tensor | None = None
    loss: tf.Tensor | None = None
    finite: tf.Tensor | None = None


def weighted_sums(output: LossOutput) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns Σ loss × weight and Σ weight as scalars, after checking `output`.

    Raises:
      ConfigError: if the loss is a scalar or in 16 bits, the weights have another
        shape, or `outputs` holds 16-bit floats.
    """
    if not isinstance(output, LossOutput):
        raise errors.ConfigError(
            f"the loss is a {type(output).__name__}; it must be an mpl.LossOutput.",
            "Return mpl.LossOutput(losses, weights, (labels, predictions)).",
        )
    losses = tf.convert_to_tensor(output.per_example)
    if losses.shape.rank == 0:
        raise errors.ConfigError(
            "`per_example` is a scalar; it must hold one loss for each example, "
            "shape [batch].",
            "Return the losses before any mean: with Keras, the function "
            "(keras.losses.sparse_categorical_crossentropy) or reduction='none'.",
        )
    _require_full_precision("per_example", losses)
    for leaf in tf.nest.flatten(output.outputs):
        if tf.is_tensor(leaf):
            _require_full_precision("outputs", leaf)
    if output.weights is None:
        raise errors.ConfigError(
            "`weights` of the loss is None; records that fill up a batch would count.",
            "Pass batch['weight'], or tf.ones_like(losses) in a loop of your own.",
        )
    weights = tf.cast(output.weights, losses.dtype)
    if not weights.shape.is_compatible_with(losses.shape):
        raise errors.ConfigError(
            f"`weights` has shape {weights.shape}, `per_example` {losses.shape}; "
            "the two must be the same.",
            "Give one weight for each loss.",
        )
    return tf.reduce_sum(losses * weights), tf.reduce_sum(weights)


def _require_full_precision(name: str, tensor: tf.Tensor) -> None:
    if tensor.dtype.is_floating and tensor.dtype.size < 4:
        raise errors.ConfigError(
            f"`{name}` of the loss is {tensor.dtype.name}; losses and what metrics "
            "read must be float32.",
            "Make the last layer float32, `Dense(10, dtype='float32')`, or cast the "
            "logits first: `mpl.cast_floating(logits, tf.float32)`.",
        )
