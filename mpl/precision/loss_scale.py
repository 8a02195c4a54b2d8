"""Loss scales: one factor that keeps small gradients from vanishing in float16."""

import numbers
from typing import Any

import tensorflow as tf

from mpl.errors import ConfigError
from mpl.precision.cast import is_floating
from mpl.precision.policy import Policy, get_policy

# Between these a scale and its reciprocal are normal float32 numbers.
_SMALLEST, _LARGEST = 2.0**-126, 2.0**126
_NORMAL = "in [2**-126, 2**126]"
_MAX_SHARERS = 62  # bits of an int64 mask


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

    def __init__(self) -> None:
        super().__init__()
        self._num_sharers = 0
        self._shared = False

    @property
    def value(self) -> tf.Tensor:
        """The scale now: a float32 scalar."""
        raise NotImplementedError

    def scale(self, tree: Any, value: tf.Tensor | None = None) -> Any:
        """Multiplies the floating leaves of a nest by the scale.

        Args:
            tree: a nest of tensors, variables, arrays, IndexedSlices or floats.
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

    def adjust(self, finite: tf.Tensor | bool, active: tf.Tensor | bool = True) -> None:
        """Ends a step: moves a dynamic scale by its rule, and no other.

        Call it in cross-replica context or without a strategy.

        Args:
            finite: bool scalar, whether all gradients of the step were finite.
            active: bool scalar; False (no example had weight) changes nothing.
        """

    def register(self) -> int:
        """Counts one more optimizer that will use this scale.

        Returns:
            The index that this optimizer hands to `adjust_shared`.

        Raises:
            ConfigError: steps have already used the scale.
        """
        if self._shared or self._num_sharers == _MAX_SHARERS:
            raise ConfigError(
                f"This loss scale already serves the steps of {self._num_sharers} "
                "optimizer(s) and cannot take another.",
                "Make a new loss scale, or make all optimizers before the first step.",
            )
        self._num_sharers += 1
        return self._num_sharers - 1

    def adjust_shared(
        self,
        index: int,
        finite: tf.Tensor | bool,
        active: tf.Tensor | bool = True,
    ) -> None:
        """Ends one optimizer's part of a step; the last one's adjusts the scale.

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
        _check("value", value, _NORMAL, lambda x: _SMALLEST <= x <= _LARGEST)
        self._value = float(value)

    @property
    def value(self) -> tf.Tensor:
        """The scale: a float32 scalar."""
        return tf.constant(self._value, tf.float32)


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
        for name, value in (("minimum", minimum), ("maximum", maximum)):
            _check(name, value, _NORMAL, lambda x: _SMALLEST <= x <= _LARGEST)
        bounds = f"in [minimum, maximum], here [{minimum}, {maximum}]"
        _check("initial", initial, bounds, lambda x: minimum <= x <= maximum)
        _check("factor", factor, "above 1 and finite", lambda x: 1 < x < float("inf"))
        _check("backoff", backoff, "between 0 and 1", lambda x: 0 < x < 1)
        for name, count in (("period", period), ("hysteresis", hysteresis)):
            _check(name, count, "an integer of at least 1", lambda x: x >= 1, int)
        self.period, self.hysteresis = int(period), int(hysteresis)
        self.factor, self.backoff = float(factor), float(backoff)
        self.minimum, self.maximum = float(minimum), float(maximum)

        def variable(value, dtype, name):
            # int64, not int32: TensorFlow keeps int32 variables off the GPU, where a
            # compiled step could not reach them.
            first = tf.VariableAggregation.ONLY_FIRST_REPLICA
            return tf.Variable(
                value, trainable=False, dtype=dtype, name=name, aggregation=first
            )

        self._scale = variable(initial, tf.float32, "scale")
        self.good_steps = variable(0, tf.int64, "good_steps")
        self.bad_steps = variable(0, tf.int64, "bad_steps")
        self._contributed = variable(0, tf.int64, "contributed")
        self._all_finite = variable(True, tf.bool, "all_finite")
        self._any_active = variable(False, tf.bool, "any_active")

    @property
    def value(self) -> tf.Tensor:
        """The scale now: a float32 scalar."""
        return self._scale.read_value()

    def next_state(
        self, scale: tf.Tensor, good: tf.Tensor, bad: tf.Tensor, finite: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Applies the rule of the class to (scale, good_steps, bad_steps).

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

    def adjust(self, finite: tf.Tensor | bool, active: tf.Tensor | bool = True) -> None:
        """Moves the scale by the rule of the class (see `LossScale.adjust`)."""
        # Branchless: a collective or a host round trip may not hang on the flag.
        state = self._scale, self.good_steps, self.bad_steps
        old = [variable.read_value() for variable in state]
        for variable, before, after in zip(state, old, self.next_state(*old, finite)):
            variable.assign(tf.where(active, after, before))

    def adjust_shared(
        self,
        index: int,
        finite: tf.Tensor | bool,
        active: tf.Tensor | bool = True,
    ) -> None:
        """Adjusts once all have contributed (see `LossScale.adjust_shared`)."""
        self._shared = True
        if self._num_sharers == 1:
            return self.adjust(finite, active)
        assert 0 <= index < self._num_sharers, "index comes from `register`"
        active = tf.cast(active, tf.bool)
        seen = tf.bitwise.bitwise_or(self._contributed.read_value(), 1 << index)
        ok = self._all_finite.read_value() & (tf.cast(finite, tf.bool) | ~active)
        some = self._any_active.read_value() | active
        last = tf.equal(seen, (1 << self._num_sharers) - 1)
        self.adjust(ok, last & some)
        self._contributed.assign(tf.where(last, tf.zeros_like(seen), seen))
        self._all_finite.assign(ok | last)
        self._any_active.assign(some & ~last)


def get_loss_scale(name: str | float | LossScale, policy: Policy) -> LossScale:
    """Makes a loss scale from its name.

    Args:
        name: `auto` (dynamic where the policy or an override computes in float16,
            else none), `none`, `dynamic`, a number, or a loss scale.
        policy: the policy that `auto` looks at.

    Raises:
        ConfigError: the name is none of these.
    """
    if isinstance(name, LossScale):
        return name
    if name == "auto":
        policies = [policy] + [get_policy(other) for _, other in policy.overrides]
        float16 = any(each.compute_dtype == tf.float16 for each in policies)
        name = "dynamic" if float16 else "none"
    if name == "none":
        return NoLossScale()
    if name == "dynamic":
        return DynamicLossScale()
    try:
        return StaticLossScale(float(name))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"`loss_scale` ({name}) must be auto, none, dynamic or a number in "
            "[2**-126, 2**126].",
            "Use auto, or a power of two such as 1024.",
        ) from error


def _multiply(tree: Any, factor: tf.Tensor) -> Any:
    def multiply(leaf):
        if isinstance(leaf, tf.IndexedSlices):
            values = multiply(leaf.values)
            return tf.IndexedSlices(values, leaf.indices, leaf.dense_shape)
        if not (isinstance(leaf, float) or is_floating(leaf)):
            return leaf
        wide = getattr(leaf, "dtype", None) in (tf.float64, "float64")
        dtype = tf.float64 if wide else tf.float32
        return tf.cast(leaf, dtype) * tf.cast(factor, dtype)

    return tf.nest.map_structure(multiply, tree)


def _check(argument, value, rule, holds, kind=numbers.Real) -> None:
    # In Python a bool is a number too. NaN passes no comparison.
    number = isinstance(value, kind) and not isinstance(value, bool)
    if not (number and holds(value)):
        raise ConfigError(
            f"`{argument}` ({value}) of a loss scale must be {rule}.",
            "The defaults of DynamicLossScale are good for nearly every model.",
        )
