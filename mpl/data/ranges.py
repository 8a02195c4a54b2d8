"""What examples must be: finite, and within the ranges that an experiment gives."""

import re
from collections.abc import Mapping

import tensorflow as tf

from mpl.errors import ConfigError

Ranges = Mapping[str, tuple[float, float]]


@tf.autograph.experimental.do_not_convert
def checked(
    examples: dict[str, tf.Tensor], *, ranges: Ranges, split: str,
    first: tf.Tensor | None = None,
) -> dict[str, tf.Tensor]:
    """Returns the examples, if none of their values breaks a rule.

    Args:
        examples: tensors `[batch, ...]` by name; floating ones must be finite.
        ranges: the lowest and the highest value allowed, by name.
        split: whose examples they are, for the message.
        first: int64, the number of the first one, for the message; None: not known.

    Raises:
        ConfigError: `ranges` names what the examples do not hold.
        tf.errors.InvalidArgumentError: a value breaks a rule; see `fault_in`.
    """
    if unknown := set(ranges) - set(examples):
        raise ConfigError(
            f"`ranges` names {sorted(unknown)}, and the examples of {split} hold "
            f"{sorted(examples)}.", "Correct the names.")
    checks = []
    for name, values in examples.items():
        if name in ranges:
            low, high = ranges[name]
            numbers, rule = tf.cast(values, tf.float64), f"lie in {low} ... {high}"
            good = (low <= numbers) & (numbers <= high)
        elif values.dtype.is_floating:
            good, rule = tf.math.is_finite(values), "be finite"
        else:
            continue
        texts = f"Split {split}: `{name}` is ", f", and must {rule}."
        checks.append(_require(good, values, texts, first))
    with tf.control_dependencies(checks):
        return {name: tf.identity(values) for name, values in examples.items()}


def _require(
    good: tf.Tensor, values: tf.Tensor, texts: tuple[str, str],
    first: tf.Tensor | None,
) -> tf.Tensor:
    def fail() -> tf.Tensor:
        place = tf.where(~good)[0]
        value = tf.cast(tf.gather_nd(values, place), tf.float64)
        parts = [texts[0], tf.strings.as_string(value, shortest=True)]
        if first is not None:
            parts += [" in example ", tf.strings.as_string(first + place[0])]
        said = tf.strings.join([*parts, texts[1]])
        check = tf.raw_ops.Assert(condition=False, data=[said])
        with tf.control_dependencies([check]):
            return tf.constant(False)

    return tf.cond(tf.reduce_all(good), lambda: tf.constant(True), fail)


def fault_in(error: tf.errors.OpError) -> ConfigError | None:
    """Returns what `checked` found, of an error that may be of something else."""
    if found := re.search(r"\[(Split .*, and must .*\.)\]", error.message):
        return ConfigError(
            found[1], "Repair the example or leave it out, or correct `ranges`.")
    return None
