"""From gradients to a decision: micro-batches, reduction, checks, all or nothing."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from mpl import errors
from mpl.step import binding as binding_lib
from mpl.step import sparse as sparse_lib
from mpl.step import state as state_lib


@dataclasses.dataclass
class Prepared:
    """One optimizer's part of a step, reduced over replicas and checked.

    Attributes:
      gradients: true gradients before clipping, one a bucket.
      clip: factor that clips them, or None.
      state: new non-trainable state, averaged over replicas; None where unwritten.
      snapshot: values to put back on a skip.
      sums: losses × weights and weights, `[2]` or scalars, over all replicas; empty
        for gradients of ordinary variables.
      health: scalar, finite only if all of the above is; squares of gradients above
        1.8e19 are not.
      squares: of the global norm before clipping.
    """

    gradients: list
    clip: tf.Tensor | None
    state: list
    snapshot: list
    sums: list
    health: tf.Tensor
    squares: tf.Tensor


@tf.autograph.experimental.do_not_convert
def apply_together(
    updates: Sequence[tuple[Any, Sequence[Any], state_lib.Forward]],
) -> None:
    """Applies the updates of several optimizers, all of them or none.

    One flag decides for all; a loss scale that they share adjusts once.

    Args:
      updates: `[(LossScaleOptimizer, gradients, forward), ...]`, as for `apply`.

    Raises:
      ConfigError: outside of replica context.
    """
    context = tf.distribute.get_replica_context()
    if context is None:
        raise errors.ConfigError(
            "gradients were applied in cross-replica context.",
            "Apply them inside the function that `strategy.run` calls.",
        )
    optimizers = [optimizer for optimizer, _, _ in updates]
    alone = [o for o in optimizers if not o.loss_scale.is_shared]
    prepared = [_prepare(context, *update) for update in updates]
    # A sum is finite only if all its terms are; it is not where no example has weight.
    flags = [tf.math.is_finite(part.health) for part in prepared]
    finite = functools.reduce(tf.logical_and, flags)
    for _, _, forward in updates:
        forward.finite = finite

    def commit(strategy: tf.distribute.Strategy, parts: list, finite) -> None:
        first = _first_of(strategy)
        parts = [Prepared(**part) for part in parts]
        finite = first(finite)
        weights = [first(part.sums[1]) for part in parts if part.sums]

        for optimizer, part in zip(optimizers, parts):
            for kept, gradient in zip(optimizer.kept, part.gradients):
                if kept is not None:
                    strategy.extended.update(kept, _assign, (gradient,), group=False)

        def active() -> tf.Tensor:
            flags = [weight != 0 for weight in weights] or [tf.constant(True)]
            return functools.reduce(tf.logical_and, flags)

        def update() -> tf.Tensor:
            for optimizer, part in zip(optimizers, parts):
                optimizer.update(strategy, part, first(part.squares))
            for optimizer in alone:
                optimizer.loss_scale.grow()
            return tf.constant(0)

        def skip() -> tf.Tensor:
            for optimizer, part in zip(optimizers, parts):
                checks = _checks(optimizer, tf.nest.map_structure(first, vars(part)))
                optimizer.skip(strategy, part, active(), checks, first(part.squares))
            for optimizer in alone:
                optimizer.loss_scale.adjust(False, active())
            return tf.constant(0)

        if not tf.executing_eagerly():
            # Inlined, all its operations would be walked through in each step.
            apart = {"_noinline": True}
            skip = tf.function(skip, autograph=False, experimental_attributes=apart)
        tf.cond(finite, update, skip)
        for optimizer in optimizers:
            if optimizer not in alone:
                optimizer.loss_scale.adjust_shared(optimizer.share, finite, active())

    parts = [dict(vars(part)) for part in prepared]
    context.merge_call(commit, args=(parts, finite))


def _assign(variable: tf.Variable, value: tf.Tensor) -> None:
    variable.assign(value)


def _first_of(strategy: tf.distribute.Strategy) -> Callable:
    """Returns a function that takes the first replica's value."""
    return lambda value: strategy.experimental_local_results(value)[0]


def _prepare(
    context: Any,
    optimizer: Any,
    gradients: Sequence[Any],
    forward: state_lib.Forward,
) -> Prepared:
    """Reduces, unscales, checks and clips; replica context, outside control flow."""
    summed = [
        _all_reduce(context, _cast(gradient, _reduce_dtype(optimizer, bucket)))
        for gradient, bucket in zip(gradients, optimizer.buckets)
    ]
    summed = [
        _cast(gradient, _wide(tf.float32, bucket))
        for gradient, bucket in zip(summed, optimizer.buckets)
    ]
    sums, state = _reduce_scalars(context, optimizer, forward)
    wide = tf.float64 in [bucket.variable.dtype for bucket in optimizer.buckets]
    dtype = tf.float64 if wide else tf.float32
    factor = tf.constant(1.0, dtype)
    if sums:
        loss_sum, weight_sum = sums
        forward.loss = tf.math.divide_no_nan(loss_sum, weight_sum)
        factor = tf.cast(optimizer.nominal_weight / weight_sum, dtype)
    factor /= tf.cast(forward.scale, dtype)
    unscaled = []
    for gradient, bucket in zip(summed, optimizer.buckets):
        if isinstance(gradient, tf.IndexedSlices):
            gradient = sparse_lib.sum_duplicates(gradient)
        gradient = map_values(lambda g: g * tf.cast(factor, g.dtype), gradient)
        if optimizer.weights is not None:
            gradient = _add_regularizers(bucket, gradient)
        unscaled.append(gradient)
    halves = [tf.cast(tf.nn.l2_loss(_values(g)), dtype) for g in unscaled]
    squares, clip = 2 * tf.add_n(halves), None
    if optimizer.clip_norm is not None:
        limit = tf.constant(optimizer.clip_norm, dtype)
        clip = limit / tf.maximum(limit, tf.sqrt(squares))
    floats = [value for value in state if value is not None and value.dtype.is_floating]
    health = tf.add_n([squares, *[tf.cast(x, dtype) for x in sums], *[
        tf.cast(tf.reduce_sum(value), dtype) for value in floats]])
    return Prepared(unscaled, clip, state, forward.snapshot, sums, health, squares)


def _checks(optimizer: Any, part: dict) -> tf.Tensor:
    """Returns floats in the order of `optimizer.check_names`, finite where all is."""
    checks = [_squares(bucket, gradient) for bucket, gradient in
              zip(optimizer.buckets, part["gradients"])]
    checks += [tf.stack(part["sums"])] * bool(part["sums"])
    checks += [
        tf.zeros([1]) if value is None or not value.dtype.is_floating
        else tf.reduce_sum(tf.abs(value))[tf.newaxis] for value in part["state"]
    ]
    return tf.concat([tf.cast(check, tf.float64) for check in checks], 0)


def _wide(reduce_dtype: tf.DType, bucket: Any) -> tf.DType:
    """Returns the dtype to reduce in: never narrower than float64 masters ask."""
    master = bucket.variable.dtype
    return master if master.size > 4 else reduce_dtype


def _reduce_dtype(optimizer: Any, bucket: Any) -> tf.DType:
    if optimizer.reduce_dtype == "compute":
        return bucket.kind.compute
    return _wide(tf.as_dtype(optimizer.reduce_dtype), bucket)


def _cast(gradient: Any, dtype: tf.DType) -> Any:
    return map_values(lambda values: tf.cast(values, dtype), gradient)


def map_values(function: Callable, gradient: Any) -> Any:
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(
            function(gradient.values), gradient.indices, gradient.dense_shape
        )
    return function(gradient)


def _all_reduce(context: Any, value: Any) -> Any:
    if context.num_replicas_in_sync == 1:
        return value
    return context.all_reduce(tf.distribute.ReduceOp.SUM, value)


def _reduce_scalars(
    context: Any, optimizer: Any, forward: state_lib.Forward
) -> tuple[list[tf.Tensor], list[tf.Tensor | None]]:
    """Sums loss and weight, and averages state, over replicas in one collective.

    Floating state becomes its mean weighted by the replicas' sums of weights, so that a
    replica without examples counts nothing. Other state is taken from the first
    replica when it is written.
    """
    if forward.weight_sum is None:
        return [], []
    sums = [forward.loss_sum, forward.weight_sum]
    if context.num_replicas_in_sync == 1:
        return sums, forward.state
    written = [value for value in forward.state if value is not None]
    floating = [value for value in written if value.dtype.is_floating]
    weight = forward.weight_sum
    flat = [
        tf.math.multiply_no_nan(tf.reshape(tf.cast(value, weight.dtype), [-1]), weight)
        for value in floating
    ]
    reduced = _all_reduce(context, tf.concat([tf.stack(sums), *flat], 0))
    sizes = [2] + [value.shape.num_elements() for value in floating]
    both, *means = tf.split(reduced, sizes)
    sums = tf.unstack(both)
    averaged = iter(
        tf.cast(tf.reshape(tf.math.divide_no_nan(mean, sums[1]), value.shape),
                value.dtype)
        for mean, value in zip(means, floating)
    )
    return sums, [
        next(averaged) if value is not None and value.dtype.is_floating else value
        for value in forward.state
    ]


def _add_regularizers(bucket: Any, gradient: Any) -> Any:
    """Adds the gradient of the weight penalties, from the masters themselves."""
    penalised = [entry.regularizer is not None for entry in bucket.entries]
    if not any(penalised):
        return gradient
    master = tf.convert_to_tensor(bucket.variable)
    with tf.GradientTape() as tape:
        tape.watch(master)
        penalty = tf.add_n([
            tf.cast(entry.regularizer(part), master.dtype)
            for entry, part in zip(bucket.entries, bucket.split(master))
            if entry.regularizer is not None
        ])
    return gradient + tf.cast(tape.gradient(penalty, master), gradient.dtype)


def _values(gradient: Any) -> tf.Tensor:
    return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient


def _squares(bucket: Any, gradient: Any) -> tf.Tensor:
    if isinstance(gradient, tf.IndexedSlices):
        return tf.reduce_sum(tf.square(gradient.values))[tf.newaxis]
    return bucket.squares(gradient)


def check_accumulation(model: Any, steps: int) -> None:
    """Raises ConfigError for a model that `accumulate` cannot run in so many steps.

    A loop over micro-batches holds no collective.
    """
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    for layer in binding_lib.flatten_layers(model) if min(steps, replicas) > 1 else ():
        if getattr(layer, "synchronized", False):
            raise errors.ConfigError(
                f"layer {layer.path!r} has `synchronized` batch statistics, which "
                f"{steps} micro-batches on {replicas} replicas cannot have.",
                "Use --accumulate_steps=1, or synchronized=False in the layer.",
            )


def accumulate(
    replica_forward: Callable,
    batch: Any,
    steps: int,
    *,
    weights: Any,
) -> tuple[list, state_lib.Forward, state_lib.LossOutput]:
    """Runs a forward and backward pass over micro-batches and sums the gradients.

        for each of `steps` slices of the batch:
            gradients += replica_forward(slice, state)   # float32, the same scale
            state = what the slice left                  # seeds and statistics go on

    Give the sums to `LossScaleOptimizer.apply` as if the batch had been one. The
    activations of one micro-batch are alive at a time.

    Args:
      replica_forward: function of (micro-batch, state) that enters
        `weights.bound(params, state)` and returns (gradients, forward, output).
      batch: nest of tensors `[batch, ...]` on this replica.
      steps: number of micro-batches; divides the batch.
      weights: the `MasterWeights` that `replica_forward` binds.

    Returns:
      Gradients, a `Forward` and the `LossOutput` of the whole batch.

    Raises:
      ConfigError: if the batch cannot be divided, or a layer of the model synchronises
        its batch statistics over several replicas.
    """
    if steps == 1:
        return replica_forward(batch, None)
    check_accumulation(weights.model, steps)
    for leaf in tf.nest.flatten(batch):
        size = leaf.shape[0] if leaf.shape.rank else None
        if leaf.shape.rank == 0 or (size is not None and size % steps):
            raise errors.ConfigError(
                f"a batch of shape {leaf.shape} on each replica cannot be cut into "
                f"{steps} micro-batches.",
                "Choose a global batch size that replicas × accumulation steps divide.",
            )
    cut = tf.nest.map_structure(
        lambda leaf: tf.reshape(leaf, [steps, -1, *leaf.shape[1:]]), batch
    )
    traced = dict[str, Any]()

    # Traced once, here, so that the loop's variables are known before it is built.
    @tf.function
    def one(index: tf.Tensor, state: list[tf.Tensor]) -> tuple:
        micro = tf.nest.map_structure(lambda leaf: leaf[index], cut)
        gradients, forward, output = replica_forward(micro, state)
        traced.update(forward=forward, output=output)
        sums = [forward.loss_sum, forward.weight_sum]
        dense = [g for g in gradients if not isinstance(g, tf.IndexedSlices)]
        rows = [(g.indices, g.values) for g in gradients
                if isinstance(g, tf.IndexedSlices)]
        sums += [tf.cast(g, _wide(tf.float32, bucket)) for g, bucket in
                 zip(dense, [b for b in weights.buckets if not b.kind.sparse])]
        kept = tf.nest.flatten((rows, output))
        kept = [leaf for leaf in kept if tf.is_tensor(leaf)]
        # Statistics of padding count nothing, here as on a replica of its own.
        some = forward.weight_sum != 0
        state = [tf.where(some, new, old) if new.dtype.is_floating else new
                 for new, old in zip(forward.state, state)]
        return sums, state, forward.scale, kept

    state = weights.initial_state()
    snapshot = weights.snapshot()
    concrete = one.get_concrete_function(
        tf.TensorSpec([], tf.int32), [tf.TensorSpec.from_tensor(x) for x in state]
    )
    sum_specs, _, scale_spec, kept_specs = concrete.structured_outputs
    kept = [
        tf.TensorArray(spec.dtype, size=steps, element_shape=spec.shape)
        for spec in kept_specs
    ]
    sums = [tf.zeros(spec.shape, spec.dtype) for spec in sum_specs]

    scale = tf.zeros(scale_spec.shape, scale_spec.dtype)

    def body(index, sums, state, _, kept):
        more, state, scale, leaves = concrete(index, state)
        sums = [total + extra for total, extra in zip(sums, more)]
        kept = [array.write(index, leaf) for array, leaf in zip(kept, leaves)]
        return index + 1, sums, state, scale, kept

    first = (tf.constant(0), sums, state, scale, kept)
    _, sums, state, scale, kept = tf.while_loop(
        lambda index, *_: index < steps, body, first)
    leaves = iter(
        tf.reshape(array.stack(), [-1, *spec.shape[1:]])  # XLA asks for static shapes
        if spec.shape.is_fully_defined() else array.concat()
        for array, spec in zip(kept, kept_specs)
    )
    whole = state_lib.Forward(
        traced["forward"].params, [], state, snapshot,
        scale=scale, loss_sum=sums[0], weight_sum=sums[1],
    )
    dense = iter(sums[2:])
    gradients = [
        tf.IndexedSlices(*reversed([next(leaves), next(leaves)]))
        if bucket.kind.sparse else next(dense) for bucket in weights.buckets
    ]
    output = tf.nest.map_structure(
        lambda leaf: next(leaves) if tf.is_tensor(leaf) else leaf, traced["output"]
    )
    return gradients, whole, output
