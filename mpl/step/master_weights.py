"""float32 master weights and their copies in the compute dtype."""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from mpl import errors
from mpl.precision import policy as policy_lib
from mpl.step import binding as binding_lib
from mpl.step import bucket as bucket_lib
from mpl.step import remat as remat_lib
from mpl.step import sparse as sparse_lib
from mpl.step import state as state_lib

PACK_BELOW = 256 * 2**10  # bytes
# Calls after which copying in and out is traced: the trace takes as long as some 30.
_TRACED_FROM = 8

# Rules that treat each element alike, so that packing cannot change their result.
# Exact types: a subclass may do otherwise.
_ELEMENTWISE = [getattr(keras.optimizers, name) for name in (
    "SGD RMSprop Adam AdamW Adamax Nadam Adagrad Adadelta Lion Ftrl").split()]


class MasterWeights:
    """The float32 weights of a model and their compute-dtype copies.

        params = weights.cast()                      # one cast per bucket
        with GradientTape() as tape:
            tape.watch(params)
            with weights.bound(params) as forward:   # the model reads params
                loss = ...
        gradients = weights.gradients(tape, loss, forward)

    A variable of `pack_below` bytes or more is its own master. Smaller ones are packed
    into a few buffers, so that casts, reductions and updates follow the number of
    buckets. Variables that their layer does not autocast (normalisation, Embedding)
    stay float32 throughout. Build it under the scope of the strategy.

    Args:
      model: a built Keras model or layer, or a `tf.Module` (Sonnet included).
      policy: a `Policy` or its name.
      pack_below: bytes from which a variable is its own bucket.
      sparse: patterns (`re.search` on the name) of further Embedding tables to update
        row by row; an Embedding of `pack_below` bytes always is. None: none is.
      no_decay: patterns of variables without weight decay.
      lr_multipliers: from pattern to factor on the learning rate; the first that
        matches counts.
      bucket_mb: bound of a packed bucket, in MB. Each is reduced over replicas as soon
        as its gradient is there: smaller ones begin earlier, larger ones are fewer.

    Raises:
      ConfigError: if the model has no variables, a pattern matches none, the variables
        belong to another strategy, or `bucket_mb` is not positive.

    Source: Micikevicius et al. 2018, Mixed Precision Training, section 3.1,
      https://arxiv.org/abs/1710.03740
    """

    def __init__(
        self,
        model: tf.Module | keras.layers.Layer,
        policy: policy_lib.Policy | str,
        *,
        pack_below: int = PACK_BELOW,
        sparse: Sequence[str] | None = (),
        no_decay: Sequence[str] = (),
        lr_multipliers: Mapping[str, float] | None = None,
        bucket_mb: float = 32,
    ):
        if not 0 < bucket_mb < float("inf"):
            raise errors.ConfigError(
                f"`bucket_mb` ({bucket_mb}) must be positive and finite.",
                "Use a number of MB such as 32.",
            )
        self.model = model
        self.policy = policy_lib.get_policy(policy)
        self.buckets: list[bucket_lib.Bucket] = []
        self._pack_below = pack_below
        self._sparse = sparse
        self._no_decay = tuple(no_decay)
        self._lr_multipliers = dict(lr_multipliers or {})
        self._bucket_bytes = int(bucket_mb * 2**20)
        self._attached: list[Any] = []
        self._inspect()

    def _inspect(self) -> None:
        self._binding = binding_lib.Binding(self.model)
        names = [entry.name for entry in self.entries]
        patterns = {"sparse": self._sparse or (), "no_decay": self._no_decay,
                    "lr_multipliers": self._lr_multipliers}
        for argument, given in patterns.items():
            for pattern in given:
                if not any(re.search(pattern, name) for name in names):
                    raise errors.ConfigError(
                        f"`{argument}` has the pattern {pattern!r}, which matches no "
                        "trainable variable.",
                        f"The variables are: {', '.join(names[:20])}"
                        f"{' …' if len(names) > 20 else ''}.",
                    )
        extended = tf.distribute.get_strategy().extended
        for entry in self.entries:
            if getattr(entry.keras_variable, "overwrite_with_gradient", False):
                raise errors.ConfigError(
                    f"`{entry.name}` is state that its gradient overwrites (float8).",
                    "Train the layer without quantization.",
                )
            if not extended.variable_created_in_scope(entry.value):
                raise errors.ConfigError(
                    f"`{entry.name}` was created outside the current strategy "
                    f"({type(tf.distribute.get_strategy()).__name__}).",
                    "Build the model, MasterWeights and the optimizer inside one "
                    "`with strategy.scope():`.",
                )

    @property
    def entries(self) -> list[binding_lib.ModelVariable]:
        """The trainable variables, in creation order."""
        return self._binding.trainable

    @property
    def state(self) -> list[binding_lib.ModelVariable]:
        """The non-trainable Keras variables that a forward pass may write."""
        return self._binding.state

    @property
    def assigned(self) -> list[binding_lib.ModelVariable]:
        """The non-trainable variables that a tf.Module assigns in place."""
        return self._binding.assigned

    @property
    def untrained(self) -> list[tf.Variable]:
        """All other variables of the model: state and frozen weights."""
        state = self._binding.state + self._binding.assigned
        return [entry.value for entry in state] + self._binding.frozen

    def by_key(self, values: Sequence[tf.Variable] | None = None) -> dict:
        """Returns each variable's value by checkpoint key; `values` as in `cast`."""
        values = values or [bucket.variable for bucket in self.buckets]
        return {
            entry.key: part
            for value, bucket in zip(values, self.buckets)
            for entry, part in zip(
                bucket.entries, bucket.split(tf.convert_to_tensor(value)))
        }

    def build(self, inner: keras.optimizers.Optimizer | None = None) -> None:
        """Groups the variables into buckets and makes the packed buffers.

        Args:
          inner: the optimizer that will update them; unless its rule is elementwise
            every variable keeps its true shape, as it does on parameter servers.
        """
        packs = inner is None or type(inner) in _ELEMENTWISE
        if isinstance(
            tf.distribute.get_strategy(), tf.distribute.ParameterServerStrategy
        ):
            packs = False  # a buffer would lie on one server
        self._calls: dict[str, int] = {}
        self._graphs: dict[str, Callable] = {}  # of `publish` and `adopt`
        # Last created first: their gradients are ready first, and so reduced first.
        self.buckets = bucket_lib.buckets_of(
            [(self._kind(entry, packs), entry) for entry in reversed(self.entries)],
            self._bucket_bytes)

    def _kind(self, entry: binding_lib.ModelVariable, packs: bool) -> bucket_lib.Kind:
        sparse = self._is_sparse(entry)
        small = entry.num_bytes < self._pack_below and entry.constraint is None
        factors = (float(factor) for pattern, factor in self._lr_multipliers.items()
                   if re.search(pattern, entry.name))
        return bucket_lib.Kind(
            master=entry.value.dtype,
            compute=entry.value.dtype if sparse else self._compute_dtype(entry),
            decay=not any(re.search(pattern, entry.name) for pattern in self._no_decay),
            multiplier=next(factors, 1.0),
            packed=packs and small and not sparse,
            sparse=sparse,
        )

    def _compute_dtype(self, entry: binding_lib.ModelVariable) -> tf.DType:
        master, compute = entry.value.dtype, self.policy.compute_dtype
        if compute is None or not master.is_floating or not entry.autocast:
            return master
        if any(owner.compute_dtype != compute.name for owner in entry.owners):
            return master
        return compute

    def _is_sparse(self, entry: binding_lib.ModelVariable) -> bool:
        if self._sparse is None:
            return False
        named = any(re.search(pattern, entry.name) for pattern in self._sparse)
        table = [type(owner) for owner in entry.owners] == [keras.layers.Embedding]
        if named and not table:
            raise errors.ConfigError(
                f"`sparse` names {entry.name!r}, which is no keras.layers.Embedding's.",
                "Only Embedding tables are updated row by row.",
            )
        return table and (named or entry.num_bytes >= self._pack_below)

    def attach(self, optimizer: Any) -> None:
        """Remembers an optimizer whose slots `rebuild` must carry over."""
        self._attached.append(optimizer)

    def rebuild(self) -> None:
        """Looks at the model anew, after layers were frozen or unfrozen.

        Slots and averages of variables that stay are kept. Step functions traced
        before must be traced again.
        """
        self.publish()
        saved = [optimizer.export_slots() for optimizer in self._attached]
        self._inspect()
        if not self._attached:
            self.build()
        for optimizer, slots in zip(self._attached, saved):
            optimizer.rebuild(slots)

    @tf.autograph.experimental.do_not_convert
    def cast(self, values: Sequence[tf.Variable] | None = None) -> list:
        """Returns the parameters in the compute dtype, one tensor a bucket.

        Args:
          values: other values laid out like the masters, such as an optimizer's
            `averages`; the masters by default.

        Returns:
          Tensors; a sparse table's place holds its tf.Variable.
        """
        self._require_built()
        values = values or [bucket.variable for bucket in self.buckets]
        kinds = [bucket.kind for bucket in self.buckets]
        return [
            value if kind.sparse else tf.cast(tf.convert_to_tensor(value), kind.compute)
            for value, kind in zip(values, kinds)
        ]

    def _require_built(self) -> None:
        if not self.buckets:
            raise errors.ConfigError(
                "`MasterWeights` has no buckets yet.",
                "Pass it to LossScaleOptimizer(weights=...), or call `build()` to "
                "evaluate without an optimizer.",
            )

    @contextlib.contextmanager
    def bound(
        self, params: Sequence[Any], state: Sequence[tf.Tensor] | None = None
    ) -> Iterator[state_lib.Forward]:
        """The model reads `params` for the time of the `with`.

        Args:
          params: from `cast`, one a bucket; slicing happens here, so watch them first.
          state: values to begin with, one for each of `self.state`; the variables'
            own by default. `accumulate` hands them from one micro-batch to the next.

        Yields:
          The `Forward` that `LossScaleOptimizer` reads.

        Raises:
          ConfigError: if the trainable set changed since `build`, or the forward pass
            writes what the step cannot carry.
        """
        self._require_built()
        self._require_same_trainables()
        forward = state_lib.Forward(list(params), [])
        for bucket, param in zip(self.buckets, params):
            forward.slices.extend(bucket.slices(param))
        forward.snapshot = self.snapshot()
        updates = []
        for number, entry in enumerate(self.state):
            if state is not None or entry.is_seed:
                value = entry.value.read_value() if state is None else state[number]
                updates.append((entry.keras_variable, self._fold(entry, value, 1)))
        with self.rebound(forward.slices, updates) as scope:
            forward.penalties = scope.losses
            with remat_lib.within(self, scope, forward.slices):
                yield forward
        forward.state = self._state_after(scope, state)

    def rebound(
        self, slices: Sequence[Any], state: Sequence[tuple[keras.Variable, tf.Tensor]]
    ) -> contextlib.AbstractContextManager:
        """Binds each variable to its slice, and Keras state to given values."""
        tensors, updates, calls = {}, list(state), []
        tables = {id(b.entries[0]) for b in self.buckets if b.kind.sparse}
        for entry, tensor in zip(self._order(), slices):
            if id(entry) in tables:
                layer, = entry.owners
                calls.append((layer, sparse_lib.lookup(layer, tensor)))
            elif entry.keras_variable is not None:
                updates.append((entry.keras_variable, tensor))
            else:
                tensors[id(entry.value)] = tensor
        return self._binding.scope(tensors, updates, calls)

    def _order(self) -> list[binding_lib.ModelVariable]:
        return [entry for bucket in self.buckets for entry in bucket.entries]

    def _require_same_trainables(self) -> None:
        changed = self._binding.changed()
        if changed:
            raise errors.ConfigError(
                f"the trainable variables are not those of `build`: {changed}.",
                "Call `weights.rebuild()` after freezing or unfreezing layers.",
            )

    def snapshot(self) -> list[tf.Tensor]:
        """Returns what the variables in `assigned` hold now."""
        return [entry.value.read_value() for entry in self.assigned]

    def initial_state(self) -> list[tf.Tensor]:
        """Returns what the variables in `state` hold now."""
        return [entry.value.read_value() for entry in self.state]

    def _fold(
        self, entry: binding_lib.ModelVariable, value: tf.Tensor, sign: int
    ) -> tf.Tensor:
        """Adds the replica's id to a seed (sign 1), or takes it off again (-1)."""
        context = tf.distribute.get_replica_context()
        if not entry.is_seed or context is None or context.num_replicas_in_sync == 1:
            return value
        # An odd constant spreads small ids over all 32 bits; unsigned sums wrap.
        offset = tf.cast(context.replica_id_in_sync_group, value.dtype)
        offset = tf.stack([offset * 0x9E3779B1, tf.zeros_like(offset)])
        return value + offset if sign > 0 else value - offset

    def _state_after(
        self, scope: Any, before: Sequence[tf.Tensor] | None
    ) -> list[tf.Tensor | None]:
        after = []
        for number, entry in enumerate(self.state):
            value = scope.get_current_value(entry.keras_variable)
            if value is not None:
                value = self._fold(entry, tf.cast(value, entry.value.dtype), -1)
            elif before is not None:
                value = before[number]
            after.append(value)
        return after

    @tf.autograph.experimental.do_not_convert
    def gradients(
        self, tape: tf.GradientTape, scaled_loss: tf.Tensor, forward: state_lib.Forward
    ) -> list[tf.Tensor | tf.IndexedSlices]:
        """Returns the gradient of each bucket, after checking each variable's.

        Args:
          tape: the tape, which watched the params before `bound`.
          scaled_loss: scalar from `LossScaleOptimizer.scale_loss`.
          forward: what `bound` yielded.

        Returns:
          Tensors like `forward.params`; a sparse table's is tf.IndexedSlices.

        Raises:
          ConfigError: if a variable has no gradient, or the tape saw a trainable
            variable that is not the model's.
        """
        local = tf.distribute.get_strategy().experimental_local_results
        own = [bucket.variable for bucket in self.buckets if bucket.kind.sparse]
        own += self._binding.frozen
        own_refs = {copy.ref() for variable in own for copy in local(variable)}
        own_refs |= {variable.ref() for variable in own}
        # The tape sees a parameter server's variable without what is around it.
        handles = {id(variable.handle) for variable in own}
        watched = tape.watched_variables()
        strangers = [v.name for v in watched
                     if v.ref() not in own_refs and id(v.handle) not in handles]
        if strangers:
            raise errors.ConfigError(
                f"the loss reads {strangers[0]!r}, a trainable variable outside the "
                "model; it would never be updated.",
                "Make it an attribute of the model, or create it with trainable=False.",
            )
        of_params, of_slices = tape.gradient(
            scaled_loss, (forward.params, forward.slices)
        )
        for entry, gradient in zip(self._order(), of_slices):
            if gradient is None:
                raise errors.ConfigError(
                    f"{entry.name!r} has no gradient: the loss does not depend on it.",
                    "Use it in the forward pass, or freeze its layer "
                    "(layer.trainable = False) before the weights are built.",
                )
        for bucket, gradient in zip(self.buckets, of_params):
            if bucket.kind.sparse and not isinstance(gradient, tf.IndexedSlices):
                raise errors.ConfigError(
                    f"{bucket.entries[0].name!r} is updated row by row but also read "
                    "as a whole (tied weights?).",
                    "Pass `sparse=None` to MasterWeights.",
                )
        # A variable read with tf.gather has row gradients too.
        return [
            gradient if bucket.kind.sparse else tf.convert_to_tensor(gradient)
            for gradient, bucket in zip(of_params, self.buckets)
        ]

    def publish(self) -> None:
        """Writes the packed masters back into the model's variables."""
        self._copy(self._publish)

    def adopt(self) -> None:
        """Reads the packed masters from the model's variables: publish's inverse."""
        self._copy(self._adopt)

    @tf.autograph.experimental.do_not_convert
    def _copy(self, function: Callable) -> None:
        """Runs many small operations: once it is clear that it pays, as one graph."""
        self._require_built()
        name, eager = function.__name__, tf.executing_eagerly()
        spread = isinstance(self.buckets[0].variable, tf.distribute.DistributedValues)
        if spread or not eager:
            return function()
        self._calls[name] = self._calls.get(name, 0) + 1
        if self._calls[name] == _TRACED_FROM:
            self._graphs[name] = tf.function(function, autograph=False)
        self._graphs.get(name, function)()

    def _publish(self) -> None:
        for bucket in self.buckets:
            if bucket.kind.packed:
                parts = bucket.split(bucket_lib.value_of(bucket.variable))
                for entry, part in zip(bucket.entries, parts):
                    entry.value.assign(part)

    def _adopt(self) -> None:
        for bucket in self.buckets:
            if bucket.kind.packed:
                values = [bucket_lib.value_of(entry.value) for entry in bucket.entries]
                bucket.variable.assign(bucket.join(values))
