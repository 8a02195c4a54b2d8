"""The optimizer of a mixed-precision step: reduce, check, then update or skip."""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from mpl import errors
from mpl.precision import loss_scale as loss_scale_lib
from mpl.step import binding as binding_lib
from mpl.step import bucket as bucket_lib
from mpl.step import fused as fused_lib
from mpl.step import gradients as gradients_lib
from mpl.step import inner_optimizer as inner_lib
from mpl.step import master_weights as master_weights_lib
from mpl.step import names as names_lib
from mpl.step import slots as slots_lib
from mpl.step import sparse as sparse_lib
from mpl.step import state as state_lib


class LossScaleOptimizer(tf.Module):
    """An inner Keras optimizer, a loss scale, and the order of a step:

        scale = loss_scale.value                    # once
        scaled = Σ(loss × weight) ÷ nominal × scale
        g = all_reduce(SUM, ∂scaled/∂params)        # one per bucket, unconditional
        g = g ÷ scale × nominal ÷ Σ weight          # float32
        finite = isfinite(Σ g²) and isfinite(state) # the same on every replica
        g = g × min(1, clip_norm ÷ ‖g‖)
        if finite: inner update, decay, averages, state
        else: nothing changes but the scale and the counters
        scale = adjust(finite)

    With `weights`, use `scale_loss(output, forward)` and `apply`; without, in any loop,
    `scale_loss(loss)` and `apply_gradients(zip(gradients, variables))`. Build it under
    the scope of the strategy and call it in replica context.

    Args:
      inner: a Keras optimizer that has not been built. Its clipping, averaging,
        accumulation and loss scale must be unset: those are done here, in this order.
      loss_scale: a `LossScale` (several optimizers may share one), "auto", "none",
        "dynamic" or a number. "auto": dynamic for float16, else none.
      weights: the `MasterWeights` to update, or None for ordinary variables.
      clip_norm: largest global norm of the true gradient, after the reduction.
      ema_decay: decay of the exponential moving average of the weights, in (0, 1).
      nominal_weight: constant by which the loss is divided before scaling, best near
        Σ weight of a global batch; it cancels out.
      reduce_dtype: dtype in which gradients are summed over replicas; "compute": each
        bucket's own compute dtype, so that 16-bit ones send half as much.

    Attributes:
      averages: moving averages laid out like the masters; empty without `ema_decay`.
      kept: variables laid out like the masters, in which a step leaves its gradients
        before clipping; None for those not wanted. Empty, unless set before a trace.
      applied_steps: int64, updates made; schedules follow it.
      skipped_steps: int64, updates refused as not finite.
      consecutive_skips: int64, refused since the last update made.
      grad_norm: float32, global norm of the last step's gradient, before clipping.

    Raises:
      ConfigError: for a setting that belongs here or cannot work.

    Source: Micikevicius et al. 2018, Mixed Precision Training, section 3.2,
      https://arxiv.org/abs/1710.03740
    """

    def __init__(
        self,
        inner: keras.optimizers.Optimizer,
        loss_scale: Any = "auto",
        weights: master_weights_lib.MasterWeights | None = None,
        *,
        clip_norm: float | None = None,
        ema_decay: float | None = None,
        nominal_weight: float = 1.0,
        reduce_dtype: Any = tf.float32,
    ):
        super().__init__(name="loss_scale_optimizer")
        inner_lib.check(inner)
        _check(clip_norm, ema_decay, nominal_weight, reduce_dtype)
        self.inner = inner
        self.loss_scale = loss_scale_lib.get_loss_scale(
            loss_scale, weights.policy if weights else None
        )
        self.weights = weights
        self.clip_norm = clip_norm
        self.ema_decay = ema_decay
        self.nominal_weight = float(nominal_weight)
        self.reduce_dtype = reduce_dtype
        self.share = self.loss_scale.register()
        self.buckets: list[bucket_lib.Bucket] = []
        self.averages: list[tf.Variable] = []
        self.kept: list[tf.Variable | None] = []
        self._skips = _host_variable(np.int64(0), "skips")
        # Position of the last bad value, whether it was NaN.
        self._bad = _host_variable(np.zeros(2, np.int64), "bad")
        self._row = _host_variable(np.int64(0), "consecutive_skips")
        self._squares = _host_variable(np.float32(0), "squared_grad_norm")
        if weights is not None:
            weights.attach(self)
            weights.build(inner)
            self._build(weights.buckets)

    @property
    def applied_steps(self) -> tf.Tensor:
        return tf.convert_to_tensor(self.inner.iterations.value)

    @property
    def skipped_steps(self) -> tf.Tensor:
        return tf.convert_to_tensor(self._skips)

    @property
    def consecutive_skips(self) -> tf.Tensor:
        return tf.convert_to_tensor(self._row)

    @property
    def grad_norm(self) -> tf.Tensor:
        return tf.sqrt(self._squares)

    @property
    def learning_rate(self) -> tf.Tensor:
        return tf.convert_to_tensor(self.inner.learning_rate)

    def build(self, variables: Sequence[tf.Variable | keras.Variable]) -> None:
        """Makes the slots for `apply_gradients` of these variables."""
        paths = [getattr(v, "path", None) or v.name.split(":")[0] for v in variables]
        members = []
        for variable, path, key in zip(
            variables, paths, names_lib.canonical(paths)
        ):
            own = variable if isinstance(variable, keras.Variable) else None
            value = variable if own is None else own.value
            kind = bucket_lib.Kind(value.dtype, value.dtype)
            members.append((kind, binding_lib.ModelVariable(path, key, value, own)))
        self._build(bucket_lib.buckets_of(members))

    def _build(self, buckets: list[bucket_lib.Bucket]) -> None:
        self.buckets = buckets
        inner_lib.check_masters(self.inner, {b.kind.master for b in buckets})
        for bucket in buckets:
            if bucket.kind.sparse:
                sparse_lib.check_rule(self.inner, bucket, self.ema_decay)
        self._slots = slots_lib.Slots(self.inner, buckets)
        if self.ema_decay is not None:
            self.averages = [
                tf.Variable(tf.convert_to_tensor(bucket.variable), trainable=False,
                            name=f"average_{number}")
                for number, bucket in enumerate(buckets)
            ]

    @tf.autograph.experimental.do_not_convert
    def scale_loss(
        self,
        loss: state_lib.LossOutput | tf.Tensor,
        forward: state_lib.Forward | None = None,
    ) -> tf.Tensor:
        """Returns the scalar to differentiate.

        Args:
          loss: with `forward`, what `Experiment.loss` returned. Without, a scalar
            already divided for the SUM over replicas.
          forward: from `MasterWeights.bound`.
        """
        if forward is None:
            return self.loss_scale.scale(loss)
        forward.scale = tf.convert_to_tensor(self.loss_scale.value)
        forward.loss_sum, forward.weight_sum = state_lib.weighted_sums(loss)
        dtype = forward.loss_sum.dtype
        factor = tf.cast(forward.scale, dtype) / self.nominal_weight
        # The scale is put on the weights: they are then the gradient of the losses.
        weights = tf.cast(loss.weights, dtype) * factor
        total = tf.reduce_sum(loss.per_example * weights)
        for penalty in forward.penalties:
            total += tf.cast(penalty, dtype) * (forward.weight_sum * factor)
        return total

    @tf.autograph.experimental.do_not_convert
    def apply(
        self,
        gradients: Sequence[tf.Tensor | tf.IndexedSlices],
        forward: state_lib.Forward,
    ) -> None:
        """Reduces, checks and applies the gradients of `weights`, or skips the step.

        Args:
          gradients: from `MasterWeights.gradients`, of the scaled loss.
          forward: the same step's; `loss` and `finite` are set on it.
        """
        gradients_lib.apply_together([(self, gradients, forward)])

    @tf.autograph.experimental.do_not_convert
    def apply_gradients(
        self, grads_and_vars: Iterable[tuple[Any, tf.Variable | keras.Variable]]
    ) -> None:
        """Applies gradients of a scaled loss to ordinary variables, or skips the step.

        Gradients are summed over replicas. Row gradients (tf.IndexedSlices) update
        single rows where the inner optimizer has a rule for it, else become dense.

        Raises:
          ConfigError: if the variables are not those of `build`, or a gradient lacks.
        """
        gradients, variables = zip(*grads_and_vars)
        values = [v.value if isinstance(v, keras.Variable) else v for v in variables]
        if not self.buckets:
            if tf.distribute.has_strategy():
                raise errors.ConfigError(
                    "`apply_gradients` under a strategy needs slots made beforehand.",
                    "Call `optimizer.build(variables)` inside `strategy.scope()`.",
                )
            with tf.init_scope():
                self.build(variables)
        if {id(v) for v in values} != {id(b.variable) for b in self.buckets}:
            raise errors.ConfigError(
                "`apply_gradients` got other variables than the optimizer was built "
                "with.",
                "Pass the same variables each time; several sets need several "
                "optimizers.",
            )
        by_variable = {id(v): g for v, g in zip(values, gradients)}
        ordered = [by_variable[id(bucket.variable)] for bucket in self.buckets]
        for number, (gradient, bucket) in enumerate(zip(ordered, self.buckets)):
            rows = isinstance(gradient, tf.IndexedSlices)
            if rows and sparse_lib.problem(self.inner, bucket):
                ordered[number] = tf.convert_to_tensor(gradient)
            if gradient is None:
                raise errors.ConfigError(
                    f"{bucket.entries[0].name!r} has no gradient.",
                    "Leave it out of `build` and `apply_gradients`.",
                )
        forward = state_lib.Forward([], [])
        forward.scale = tf.convert_to_tensor(self.loss_scale.value)
        gradients_lib.apply_together([(self, ordered, forward)])

    def update(
        self,
        strategy: tf.distribute.Strategy,
        prepared: "gradients_lib.Prepared",
        squares: tf.Tensor,
    ) -> None:
        """Updates everything; cross-replica context, and only if the step is finite."""
        extended = strategy.extended
        rate = self.inner.learning_rate
        rule = fused_lib.rule(self.inner)
        slots_lib.advance(self.inner)
        for number, bucket in enumerate(self.buckets):
            def update_one(
                variable, gradient, clip, rate, number=number, bucket=bucket
            ):
                rate = tf.cast(rate, variable.dtype)
                if bucket.kind.multiplier != 1.0:
                    rate *= bucket.kind.multiplier
                if clip is not None:
                    gradient = gradients_lib.map_values(
                        lambda g: g * tf.cast(clip, g.dtype), gradient)
                if isinstance(gradient, tf.IndexedSlices):
                    rows = self._slots.of(number)
                    sparse_lib.update_rows(self.inner, variable, gradient, rate, rows)
                    return
                decay = self._slots.decay(number)
                if decay and bucket.kind.decay:
                    variable.assign_sub(variable * decay * rate)
                if rule is not None and fused_lib.pays(variable):
                    rule(variable, gradient, rate, self._slots.of(number))
                else:
                    self.inner.update_step(gradient, variable, rate)
                constraint = bucket.entries[0].constraint
                if constraint is not None:
                    variable.assign(constraint(tf.convert_to_tensor(variable)))

            extended.update(
                bucket.variable, update_one,
                (prepared.gradients[number], prepared.clip, rate), group=False)
        for average, bucket in zip(self.averages, self.buckets):
            extended.update(average, self._average, (bucket.variable,), group=False)
        state = self.weights.state if self.weights else []
        for entry, value in zip(state, prepared.state):
            if value is not None:
                if not entry.value.dtype.is_floating:  # not averaged: it may differ
                    value = strategy.experimental_local_results(value)[0]
                extended.update(entry.value, _assign, (value,), group=False)
        self.inner.iterations.value.assign_add(1)  # Keras's own is not atomic
        self._row.assign(0)
        self._squares.assign(tf.cast(squares, tf.float32))

    def _average(self, average: tf.Variable, master: tf.Variable) -> None:
        assert self.ema_decay is not None
        average.assign_sub((1.0 - self.ema_decay) * (average - master))

    def skip(
        self,
        strategy: tf.distribute.Strategy,
        prepared: "gradients_lib.Prepared",
        active: tf.Tensor | bool,
        checks: tf.Tensor,
        squares: tf.Tensor,
    ) -> None:
        """Undoes what a tf.Module assigned in place, and counts; cross-replica context.

        Args:
          active: whether any example had weight; if none had, nothing is counted.
          checks: floats `[n]`, as `check_names`, finite if what they look at is.
        """
        assigned = self.weights.assigned if self.weights else []
        for entry, value in zip(assigned, prepared.snapshot):
            strategy.extended.update(entry.value, _assign, (value,), group=False)
        bad = ~tf.math.is_finite(checks)
        # -1: another optimizer's gradients were bad, see `apply_together`.
        first = tf.argmax(tf.cast(bad, tf.int32))
        is_nan = tf.cast(tf.math.is_nan(tf.gather(checks, first)), tf.int64)
        position = tf.where(tf.reduce_any(bad), first, -tf.ones_like(first))
        new = tf.stack([position, is_nan])
        self._bad.assign(tf.where(active, new, self._bad.read_value()))
        self._skips.assign_add(tf.cast(active, tf.int64))
        self._row.assign_add(tf.cast(active, tf.int64))
        self._squares.assign(
            tf.where(active, tf.cast(squares, tf.float32), self._squares))

    def check_names(self) -> list[str]:
        """Returns what each of the checks of a step looks at."""
        names = [entry.name for bucket in self.buckets for entry in bucket.entries]
        return names + ["the loss", "the sum of weights"] + [
            entry.name for entry in (self.weights.state if self.weights else [])
        ]

    def nonfinite_report(self) -> str | None:
        """Returns what was bad in the last skipped step; None if nothing here was."""
        position, is_nan = self._bad.numpy()
        row = int(self.consecutive_skips)
        if position < 0 or row == 0:
            return None
        name = self.check_names()[position]
        return (
            f"{row} steps in a row were skipped: {'nan' if is_nan else 'inf'} in "
            f"{name!r} at loss scale {float(self.loss_scale.value):g}"
        )

    # What checkpoints hold: one entry per variable, whatever the packing.

    def _trackable_children(self, save_type: str = "checkpoint", **kwargs: Any) -> dict:
        return {"loss_scale": self.loss_scale} if save_type == "checkpoint" else {}

    def _serialize_to_tensors(self) -> dict[str, tf.Tensor]:
        seeds = {key: tf.convert_to_tensor(v) for key, v in self._seeds().items()}
        counts = [self._skips.read_value(), *tf.unstack(self._bad), self._row]
        return {"counts": tf.stack(counts), **seeds, **self.export_slots()}

    def _restore_from_tensors(self, restored: Mapping[str, tf.Tensor]) -> None:
        self._skips.assign(restored["counts"][0])
        self._bad.assign(restored["counts"][1:3])
        self._row.assign(restored["counts"][3])
        for key, variable in self._seeds().items():
            variable.assign(restored[key])
        self._import(restored)

    def _seeds(self) -> dict[str, tf.Variable]:
        """Returns the model's seeds: TensorFlow does not find them in Keras layers."""
        state = self.weights.state if self.weights else []
        return {slots_lib.entry_key("seed", entry.key): entry.value
                for entry in state if entry.is_seed}

    def export_slots(self) -> dict[str, tf.Tensor]:
        """Returns slots and averages, one entry per variable."""
        values = self._slots.export()
        for bucket, average in zip(self.buckets, self.averages):
            values.update(slots_lib.by_entry("average", bucket, average))
        return values

    def _import(self, values: Mapping[str, tf.Tensor]) -> None:
        self._slots.restore(values)
        for bucket, average in zip(self.buckets, self.averages):
            slots_lib.restore_entries("average", bucket, average, values)

    def rebuild(self, slots: Mapping[str, tf.Tensor]) -> None:
        """Makes slots for the trainable variables of now, keeping old values."""
        assert self.weights is not None
        self.inner = type(self.inner).from_config(self.inner.get_config())
        self.weights.build(self.inner)
        self._build(self.weights.buckets)
        self._import(slots)


def _check(
    clip_norm: float | None, ema_decay: float | None, nominal_weight: float,
    reduce_dtype: Any,
) -> None:
    if clip_norm is not None and not 0 < clip_norm < float("inf"):
        cause = f"`clip_norm` ({clip_norm}) must be positive and finite."
        remedy = "Use a number such as 1.0, or None not to clip."
        raise errors.ConfigError(cause, remedy)
    if ema_decay is not None and not 0 < ema_decay < 1:
        cause = f"`ema_decay` ({ema_decay}) must lie between 0 and 1."
        remedy = "Use a number such as 0.999, or None for no averages."
        raise errors.ConfigError(cause, remedy)
    if not 0 < nominal_weight < float("inf"):
        cause = f"`nominal_weight` ({nominal_weight}) must be positive and finite."
        raise errors.ConfigError(cause, "Use the global batch size, or 1.0.")
    with contextlib.suppress(TypeError):  # it names no dtype
        if reduce_dtype == "compute" or tf.as_dtype(reduce_dtype).is_floating:
            return
    cause = f"`reduce_dtype` ({reduce_dtype}) must be a floating dtype or 'compute'."
    remedy = "Use float32, or 'compute' to sum 16-bit gradients in 16 bits."
    raise errors.ConfigError(cause, remedy)


def _assign(variable: tf.Variable, value: tf.Tensor) -> None:
    variable.assign(value)


def _host_variable(value: Any, name: str) -> tf.Variable:
    return tf.Variable(
        value, trainable=False, name=name,
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
    )
