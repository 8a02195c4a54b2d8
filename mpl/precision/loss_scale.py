"""Loss scales: one factor that keeps small gradients from vanishing in float16."""

from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf
from absl import logging

from mpl.errors import ConfigError
from mpl.precision.cast import map_floating
from mpl.precision.policy import Policy, get_policy, on_tpu

# Between these a scale and its reciprocal are normal float32 numbers.
_SMALLEST, _LARGEST = 2.0**-126, 2.0**126

Flag: TypeAlias = tf.Tensor | bool


class LossScale(tf.Module):
    """The factor that multiplies a loss, and divides the gradients after it.

        value = loss_scale.value                    # read once a step
        loss = loss_scale.scale(loss, value)
        gradients = gradient of loss
        gradients = loss_scale.unscale(gradients, value)
        loss_scale.adjust(all gradients are finite)

    Attributes:
        is_dynamic: whether `adjust` ever changes the value.

    Source: Micikevicius et al., Mixed Precision Training, arXiv:1710.03740, 3.2.
    """

    is_dynamic = False
    _value: Any  # float or tf.Variable
    _num_sharers = 0
    _in_use = False

    @property
    def value(self) -> tf.Tensor:
        """The scale now: a float32 scalar."""
        return tf.convert_to_tensor(self._value)

    def scale(self, tree: Any, value: tf.Tensor | None = None) -> Any:
        """Multiplies the floating leaves of a nest by the scale.

        Args:
            tree: a nest of tensors, IndexedSlices, variables, arrays or floats.
                Leaves that are not floating pass.
            value: the scale as read at the start of the step; read now by default.

        Returns:
            The same nest. 16-bit leaves come back as float32, because a float16
            product would overflow at 2**16.
        """
        return _multiply(tree, self.value if value is None else value)

    def unscale(self, tree: Any, value: tf.Tensor | None = None) -> Any:
        """Multiplies by the scale's reciprocal; otherwise as `scale`."""
        value = self.value if value is None else value
        return _multiply(tree, 1.0 / tf.cast(value, tf.float32))

    def adjust(self, finite: Flag, active: Flag = True) -> None:
        """Ends a step: moves a dynamic scale by its rule, and no other.

        Call it in cross-replica context or without a strategy.

        Args:
            finite: bool scalar, whether all gradients of the step were finite.
            active: bool scalar; False (no example had weight) changes nothing.
        """

    def grow(self) -> None:
        """Ends a finite step as `adjust(True)` does, in fewer operations."""

    def register(self) -> int:
        """Counts one more optimizer that will use this scale.

        Returns:
            The index that this optimizer hands to `adjust_shared`.

        Raises:
            ConfigError: steps have already used the scale.
        """
        if self._in_use:
            cause = f"A loss scale in use by {self._num_sharers} cannot take another."
            raise ConfigError(cause, "Make all optimizers before the first step.")
        self._num_sharers += 1
        return self._num_sharers - 1

    @property
    def is_shared(self) -> bool:
        """Whether several optimizers have registered."""
        return self._num_sharers > 1

    def adjust_shared(self, index: int, finite: Flag, active: Flag = True) -> None:
        """Ends one sharer's part of a step; the last one's adjusts the scale.

        The scale is adjusted once all registered optimizers have contributed, on
        the AND of their flags. An inactive part counts as contributed, but its flag
        does not; if all were inactive, nothing changes.

        Args:
            index: what `register` returned.
            finite: bool scalar, as in `adjust`.
            active: bool scalar, as in `adjust`.
        """


class StaticLossScale(LossScale):
    """A constant scale.

    Args:
        value: the scale, in [2**-126, 2**126].
    """

    def __init__(self, value: float):
        super().__init__()
        _check("value", value, _SMALLEST, _LARGEST,
               remedy="Use a power of two such as 1024.")  # fmt: skip
        self._value = float(value)


class NoLossScale(StaticLossScale):
    """A scale of 1, for dtypes that need none."""

    def __init__(self) -> None:
        super().__init__(1.0)


class DynamicLossScale(LossScale):
    """A scale that grows while gradients are finite and backs off when they are not.

        if finite:
            good_steps += 1
            if good_steps == period:
                scale = min(scale * factor, maximum)
                good_steps = bad_steps = 0
        else:
            good_steps = 0
            bad_steps += 1
            if bad_steps >= hysteresis:
                scale = max(scale * backoff, minimum)

    With hysteresis 1 and away from the bounds this is PyTorch's GradScaler;
    hysteresis (non-finite steps since the last growth that are forgiven, plus one)
    is Megatron-LM's. The scale stays in [minimum, maximum], always.

    Args:
        initial: first scale, in [minimum, maximum].
        period: finite steps in a row before the scale grows, at least 1.
        factor: what it grows by, above 1.
        backoff: what it shrinks by, between 0 and 1.
        minimum: lowest scale, at least 2**-126.
        maximum: highest scale, at most 2**126.
        hysteresis: non-finite steps before the first backoff, at least 1.

    Attributes:
        good_steps: int64 scalar, finite steps since the last change or overflow.
        bad_steps: int64 scalar, non-finite steps since the last growth.

    Raises:
        ConfigError: an argument is out of its range.

    Source: https://docs.pytorch.org/docs/stable/amp.html, Megatron-LM
    `core/optimizer/grad_scaler.py`.
    """

    is_dynamic = True

    def __init__(
        self,
        initial: float = 2.0**15,
        period: int = 2000,
        factor: float = 2.0,
        backoff: float = 0.5,
        minimum: float = 2.0**-14,
        maximum: float = 2.0**24,
        hysteresis: int = 1,
    ):
        super().__init__()
        _check("minimum", minimum, _SMALLEST, _LARGEST)
        _check("maximum", maximum, _SMALLEST, _LARGEST)
        _check("initial", initial, minimum, maximum)
        _check("factor", factor, 1 + 2.0**-23, _LARGEST)
        _check("backoff", backoff, _SMALLEST, 1 - 2.0**-24)
        _check("period", period, 1, 2**31, int)
        _check("hysteresis", hysteresis, 1, 2**31, int)
        self.minimum, self.maximum = float(minimum), float(maximum)
        self.factor, self.backoff = float(factor), float(backoff)
        self.period, self.hysteresis = period, hysteresis
        # int64, not int32: TensorFlow keeps int32 variables off the GPU, where a
        # compiled step could not reach them.
        self._value = _variable(np.float32(initial), "scale")
        self._steps = _variable(np.zeros(2, np.int64), "steps")  # good ones, bad ones
        # Of a round of sharers: bit mask of who contributed, active parts, bad ones.
        self._round = _variable(np.zeros(3, np.int64), "round")

    @property
    def good_steps(self) -> tf.Tensor:
        return self._steps[0]

    @property
    def bad_steps(self) -> tf.Tensor:
        return self._steps[1]

    def next_state(self, finite: Flag, scale: Any, good: Any, bad: Any) -> tuple:
        """Returns (scale, good_steps, bad_steps) after a step, by the class's rule.

        A pure, elementwise function: tensors may have any shape.
        """
        zero = tf.zeros_like(good)
        good = tf.where(finite, good + 1, zero)
        bad = tf.where(finite, bad, bad + 1)
        grow = good >= self.period
        shrink = ~tf.cast(finite, tf.bool) & (bad >= self.hysteresis)
        scale *= tf.where(grow, self.factor, tf.where(shrink, self.backoff, 1.0))
        scale = tf.clip_by_value(scale, self.minimum, self.maximum)
        return scale, tf.where(grow, zero, good), tf.where(grow, zero, bad)

    def adjust(self, finite: Flag, active: Flag = True) -> None:
        """Moves the scale by the rule of the class (see `LossScale.adjust`)."""
        # Branchless: a collective or a host round trip may not hang on the flag.
        scale, steps = self._value.read_value(), self._steps.read_value()
        new_scale, *new_steps = self.next_state(finite, scale, *tf.unstack(steps))
        self._value.assign(tf.where(active, new_scale, scale))
        self._steps.assign(tf.where(active, tf.stack(new_steps), steps))

    def grow(self) -> None:
        """Ends a finite step (see `LossScale.grow`)."""
        self._in_use = True
        steps = self._steps + np.array([1, 0])
        grows = steps[0] >= self.period
        self._steps.assign(tf.where(grows, tf.zeros_like(steps), steps))
        factor = tf.where(grows, self.factor, 1.0)
        self._value.assign(tf.minimum(self._value * factor, self.maximum))

    def adjust_shared(self, index: int, finite: Flag, active: Flag = True) -> None:
        """Adjusts once all have contributed (see `LossScale.adjust_shared`)."""
        self._in_use = True
        if self._num_sharers < 2:
            return self.adjust(finite, active)
        finite, active = tf.cast(finite, tf.bool), tf.cast(active, tf.bool)
        who, num_active, num_bad = tf.unstack(self._round.read_value())
        who = tf.bitwise.bitwise_or(who, 1 << index)
        num_active += tf.cast(active, tf.int64)
        num_bad += tf.cast(active & ~finite, tf.int64)
        last = tf.equal(who, (1 << self._num_sharers) - 1)
        self.adjust(num_bad < 1, last & (num_active > 0))
        counted = tf.stack([who, num_active, num_bad])
        self._round.assign(tf.where(last, tf.zeros_like(counted), counted))


def get_loss_scale(name: Any, policy: Policy | None = None) -> LossScale:
    """Makes a loss scale from its name.

    Under a `ParameterServerStrategy`, where several workers would adjust a scale at a
    time, there is no dynamic one, and `auto` is 1024 in place of it.

    Args:
        name: `auto` (dynamic where the policy or an override computes in float16,
            else none), `none`, `dynamic`, a number, or a loss scale.
        policy: the policy that `auto` looks at; without one, `auto` is none.

    Raises:
        ConfigError: the name is none of these, or the scale would be dynamic on a TPU
            or parameter servers.
    """
    loss_scale = name if isinstance(name, LossScale) else _named(name, policy)
    if not loss_scale.is_dynamic:
        return loss_scale
    shown = name if isinstance(name, str) else type(name).__name__
    if on_tpu():
        raise ConfigError(
            f"`loss_scale` ({shown}) is dynamic, which float16 needs; a TPU computes "
            "in bfloat16, which needs none.",
            "Use --policy=mixed_bfloat16 with --loss_scale=auto.")
    strategy = tf.distribute.get_strategy()
    if not isinstance(strategy, tf.distribute.ParameterServerStrategy):
        return loss_scale
    if name == "auto":
        logging.info("loss_scale auto: 1024, none dynamic on parameter servers")
        return StaticLossScale(1024)
    raise ConfigError(
        f"`loss_scale` ({shown}) is dynamic, which parameter servers do not allow.",
        "Use --loss_scale=1024, or another power of two.")


def resolved(name: Any, policy: Policy | None) -> Any:
    """Returns the name of a loss scale, with `dynamic` or `none` for `auto`."""
    if name != "auto":
        return name
    names = [policy.name, *dict(policy.overrides).values()] if policy else []
    float16 = [n for n in names if get_policy(n).compute_dtype == tf.float16]
    return "dynamic" if float16 else "none"


def _named(name: Any, policy: Policy | None) -> LossScale:
    name = resolved(name, policy)
    makers = {"none": NoLossScale, "dynamic": DynamicLossScale}
    try:
        return makers[name]() if name in makers else StaticLossScale(float(name))
    except (TypeError, ValueError) as error:
        cause = f"`loss_scale` ({name}) must be auto, none, dynamic or a number from "
        remedy = "Use auto, or a power of two such as 1024."
        raise ConfigError(f"{cause}2**-126 to 2**126.", remedy) from error


def _multiply(tree: Any, factor: tf.Tensor) -> Any:
    def multiply(leaf):
        dtype = max(tf.float32, tf.as_dtype(leaf.dtype), key=lambda dtype: dtype.size)
        return tf.cast(leaf, dtype) * tf.cast(factor, dtype)

    def to_tensor(leaf):
        return tf.constant(leaf) if isinstance(leaf, float) else leaf

    return map_floating(multiply, tf.nest.map_structure(to_tensor, tree))


def _variable(value: Any, name: str) -> tf.Variable:
    first = tf.VariableAggregation.ONLY_FIRST_REPLICA
    return tf.Variable(value, trainable=False, name=name, aggregation=first)


def _check(argument: str, value: Any, low: float, high: float, kind=float,
           remedy="The default is good for nearly every model.") -> None:  # fmt: skip
    # A bool is an int too. NaN passes no comparison.
    is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
    if not (is_number and low <= value <= high):
        cause = f"`{argument}` ({value}) must be {kind.__name__} in [{low}, {high}]."
        raise ConfigError(cause, remedy)
