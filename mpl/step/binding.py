"""Makes a model read given tensors where it would read its variables.

Keras layers read through `keras.StatelessScope`. Plain `tf.Module`s have no such door:
their attributes are lent, that is, replaced by the tensors for the time of the trace.
The only file that touches private attributes of Keras: `_flatten_layers` (there is no
public listing of nested layers), `_trainable_variables` (tells a frozen weight from
state), `_autocast` (tells a float32 island), `_u_product` of Nadam and what
`exclude_from_weight_decay` of an optimizer leaves. A canary test watches them all.
"""

import collections.abc
import contextlib
import dataclasses
import os
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from mpl import errors
from mpl.step import names as names_lib

_SEED_NAME = "seed_generator_state"
# MirroredStrategy traces each replica on a thread of its own.
_thread = threading.local()


@dataclasses.dataclass(eq=False)
class ModelVariable:
    """One variable of a model.

    Attributes:
      name: path in the model, for messages and for matching patterns.
      key: path that does not depend on what else the process built, for checkpoints.
      value: the tf.Variable.
      keras_variable: the keras.Variable around it; None in a tf.Module.
      owners: the Keras layers whose variable it is; several where weights are tied.
      autocast: whether its layer reads it in the layer's compute dtype.
    """

    name: str
    key: str
    value: tf.Variable
    keras_variable: keras.Variable | None = None
    owners: tuple[keras.layers.Layer, ...] = ()
    autocast: bool = True

    @property
    def is_seed(self) -> bool:
        return getattr(self.keras_variable, "name", None) == _SEED_NAME

    @property
    def regularizer(self) -> Callable | None:
        return getattr(self.keras_variable, "regularizer", None)

    @property
    def constraint(self) -> Callable | None:
        return getattr(self.keras_variable, "constraint", None)

    @property
    def num_bytes(self) -> int:
        return self.value.shape.num_elements() * self.value.dtype.size


class Binding:
    """The variables of a model, and the way to bind them to tensors.

    Attributes:
      trainable: variables that take part in training, in creation order.
      state: non-trainable Keras variables that a forward pass may write.
      assigned: non-trainable variables of tf.Modules, which assign them in place.
      frozen: weights of Keras layers that do not train.
    """

    def __init__(self, model: tf.Module | keras.layers.Layer):
        self._model = model
        self._lender: int | None = None
        self.trainable: list[ModelVariable] = []
        self.state: list[ModelVariable] = []
        self.assigned: list[ModelVariable] = []
        self.frozen: list[tf.Variable] = []
        self._loans: list[tuple[dict, str]] = []
        modules, layers = _find_parts(model)
        for path, layer in layers:
            self._add_keras(path, layer)
        lent = set()
        for path, variable, (attributes, name) in modules:
            kind = self.trainable if variable.trainable else self.assigned
            if all(variable is not known.value for known in kind):
                kind.append(ModelVariable(path, path, variable))
            if variable.trainable and (id(attributes), name) not in lent:
                lent.add((id(attributes), name))
                self._loans.append((attributes, name))
        self._trained_ids = _trained_ids(model)
        known = self.trainable + self.state
        self._known = {id(entry.keras_variable) for entry in known}
        self._trained = {id(entry.keras_variable) for entry in self.trainable}
        if not self.trainable:
            raise errors.ConfigError(
                f"`model` ({type(model).__name__}) has no trainable variable.",
                "Build it first (call it on one batch, or give Keras an Input), and "
                "unfreeze what should train.",
            )

    def _add_keras(self, path: str, model: keras.layers.Layer) -> None:
        owners: dict[int, list[keras.layers.Layer]] = {}
        for layer in model._flatten_layers():
            for variable in layer._trainable_variables:
                owners.setdefault(id(variable), []).append(layer)
        metrics = {id(variable) for variable in model.metrics_variables}
        keys = names_lib.canonical([variable.path for variable in model.variables])
        seen = {id(entry.keras_variable) for entry in self.trainable + self.state}
        trainable = {id(variable) for variable in model.trainable_variables}
        for variable, key in zip(model.variables, keys):
            if id(variable) in seen or id(variable) in metrics:
                continue
            of = owners.get(id(variable), [])
            entry = ModelVariable(
                name=variable.path,
                key=f"{path}/{key}" if path else key,
                value=variable.value,
                keras_variable=variable,
                owners=tuple(of),
                autocast=variable._autocast and all(layer.autocast for layer in of),
            )
            if id(variable) in trainable:
                self.trainable.append(entry)
            elif of:
                self.frozen.append(entry.value)
            else:
                self.state.append(entry)

    def changed(self) -> str | None:
        """Returns what differs now in the model's trainable set, or None."""
        if self._lender is not None:
            return None  # attributes are tensors now; it was checked before
        if _trained_ids(self._model) == self._trained_ids:
            return None  # to list them is cheaper than to look at all again
        now = {id(entry.value): entry.name for entry in Binding(self._model).trainable}
        then = {id(entry.value): entry.name for entry in self.trainable}
        gone = [f"{then[key]!r} went" for key in then if key not in now]
        come = [f"{now[key]!r} came" for key in now if key not in then]
        return next(iter(gone + come), None)

    @contextlib.contextmanager
    def scope(
        self,
        tensors: dict[int, tf.Tensor],
        updates: list[tuple[keras.Variable, tf.Tensor]],
        calls: list[tuple[keras.layers.Layer, Callable]],
    ) -> Iterator["_Scope"]:
        """Binds for the time of the `with`.

        Args:
          tensors: from the id of a tf.Variable to the tensor that a tf.Module reads.
          updates: what Keras variables read as.
          calls: layers whose `call` is another for this time.
        """
        loans = [(home, name, _replaced(home[name], tensors)) for home, name in
                 self._loans]
        loans += [(vars(layer), "call", call) for layer, call in calls]
        scope = _Scope(self._known, self._trained)
        for update in updates:
            scope.state_mapping[id(update[0])] = update[1]
        with self._lend(loans), scope:
            yield scope

    @contextlib.contextmanager
    def _lend(self, loans: list[tuple[dict, str, Any]]) -> Iterator[None]:
        if not loans:
            yield
            return
        former, me = self._lender, threading.get_ident()
        if former not in (None, me):
            raise errors.ConfigError(
                "a second replica entered `bound` while the first stands inside it, in "
                f"a collective: {_collective_of(former)}. The model is a tf.Module or "
                "has a sparse table, whose variables one replica at a time may borrow.",
                "Keep collectives (all_reduce, synchronised batch normalisation, "
                "aggregated assigns) out of the forward pass of such models.",
            )
        missing = object()
        saved = [(home, name, home.get(name, missing)) for home, name, _ in loans]
        self._lender = me
        try:
            for home, name, value in loans:
                home[name] = value
            yield
        finally:
            for home, name, value in reversed(saved):
                if value is missing:
                    home.pop(name, None)
                else:
                    home[name] = value
            self._lender = former


class _Scope(keras.StatelessScope):
    """A StatelessScope that refuses writes which the step could not carry.

    What it does not know it leaves to the scope around it, so that two models can be
    bound at a time; Keras alone would look into the innermost only.
    """

    def __init__(self, known: set[int], trainable: set[int]):
        super().__init__(collect_losses=True)
        self._known, self._trainable = known, trainable
        self._graph = None if tf.executing_eagerly() else _graph()

    def __enter__(self) -> "_Scope":
        self._outer = getattr(_thread, "scope", None)
        _thread.scope = self
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        _thread.scope = self._outer
        super().__exit__(*args)

    def get_current_value(self, variable: keras.Variable) -> tf.Tensor | None:
        value = super().get_current_value(variable)
        if value is None and self._outer is not None:
            return self._outer.get_current_value(variable)
        return value

    def add_loss(self, loss: tf.Tensor) -> None:
        if self._outer is not None:
            raise errors.ConfigError(
                f"{_calling_layer()} calls `add_loss` inside `mpl.remat` or while two "
                "models are bound; whose loss it is cannot be told.",
                "Return the term from the model and add it to the loss.",
            )
        super().add_loss(loss)

    def add_update(self, update: tuple[keras.Variable, tf.Tensor]) -> None:
        variable, value = update
        if id(variable) in self._trainable:
            raise errors.ConfigError(
                f"{_calling_layer()} assigns {variable.path!r}, which is trained.",
                "Compute what the layer needs from the weight without assigning it.",
            )
        if id(variable) not in self._known and self._outer is not None:
            self._outer.add_update(update)
            return
        if id(variable) not in self._known:
            if variable.name == _SEED_NAME:
                what = "draws from a seed that is not the model's"
                remedy = (
                    "Give the layer its own `keras.random.SeedGenerator` as an "
                    "attribute and pass it as `seed=`."
                )
            else:
                what = f"writes {variable.path!r}, which is not state of the model"
                remedy = (
                    "Update metrics outside the forward pass: return what they need "
                    "in `LossOutput.outputs`."
                )
            raise errors.ConfigError(f"{_calling_layer()} {what}.", remedy)
        if self._graph is not None and tf.is_tensor(value) and (
            getattr(value, "graph", self._graph) is not self._graph
        ):
            raise errors.ConfigError(
                f"{_calling_layer()} writes {variable.path!r} inside a tf.while or "
                "tf.cond; its value cannot leave that graph.",
                "Write the state after the loop, or unroll the loop in Python.",
            )
        super().add_update(update)


def flatten_layers(model: tf.Module | keras.layers.Layer) -> list[keras.layers.Layer]:
    """Returns every Keras layer in `model`, nested ones too, each once."""
    found: dict[int, keras.layers.Layer] = {}
    for _, layer in _find_parts(model)[1]:
        found.update((id(inner), inner) for inner in layer._flatten_layers())
    return list(found.values())


def momentum_product(nadam: keras.optimizers.Nadam) -> keras.Variable:
    """Returns the state that Nadam keeps outside of its `update_step`."""
    return nadam._u_product


def excludes_from_decay(inner: keras.optimizers.Optimizer) -> bool:
    """Returns whether `exclude_from_weight_decay` was called on an optimizer."""
    named = getattr(inner, "_exclude_from_weight_decay_pattern", None)
    return bool(named or getattr(inner, "_exclude_from_weight_decay", None))


def _graph() -> tf.Graph:
    return tf.compat.v1.get_default_graph()


def _calling_layer() -> str:
    """Returns the name of the innermost Keras layer on the stack."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, keras.layers.Layer):
            return f"layer {owner.path!r} ({type(owner).__name__})"
        frame = frame.f_back
    return "the forward pass"


def _collective_of(thread: int) -> str:
    """Returns what another thread waits for, as `all_reduce in replica_step`."""
    frame = sys._current_frames().get(thread)
    stack = traceback.extract_stack(frame) if frame else []
    library = ("tensorflow", "threading.py", "contextlib.py")
    name = "unknown"
    for part in reversed(stack):
        path = part.filename.split(os.sep)
        if "distribute" in path:
            name = part.name
        elif not any(word in path for word in library):
            return f"{name} in {part.name.removeprefix('tf__')}"  # AutoGraph's prefix
    return name


def _trained_ids(model: Any) -> list[int]:
    modules, layers = _find_parts(model)
    ids = [id(variable) for _, variable, _ in modules if variable.trainable]
    return ids + [id(v) for _, layer in layers for v in layer.trainable_variables]


def _find_parts(root: Any) -> tuple[list, list]:
    """Walks `root`; returns module variables and the outermost Keras layers.

    Returns:
      `[(path, tf.Variable, (vars of the module, attribute name)), ...]` and
      `[(path, keras layer), ...]`, in the order of attributes.
    """
    variables: list[tuple[str, tf.Variable, tuple[dict, str]]] = []
    layers: list[tuple[str, keras.layers.Layer]] = []
    seen: set[int] = set()

    def walk(value: Any, path: str, home: tuple[dict, str] | None) -> None:
        if isinstance(value, tf.random.Generator):
            value = value.state
        if isinstance(value, tf.Variable):
            if home is not None:
                variables.append((path, value, home))
            return
        if isinstance(value, (keras.layers.Layer, tf.Module)):
            if id(value) in seen:
                return
            seen.add(id(value))
            if isinstance(value, keras.layers.Layer):
                layers.append((path, value))
                return
            attributes = vars(value)
            for name, attribute in list(attributes.items()):
                # TensorFlow's own bookkeeping lists every variable a second time.
                if not name.startswith(("_self_", "_tf_", "_obj_")):
                    inner = f"{path}/{name}" if path else name
                    walk(attribute, inner, (attributes, name))
        elif isinstance(value, collections.abc.Mapping):
            for name, item in value.items():
                walk(item, f"{path}/{name}", home)
        elif isinstance(value, (list, tuple)):
            for number, item in enumerate(value):
                walk(item, f"{path}/{number}", home)

    walk(root, "", None)
    return variables, layers


def _replaced(value: Any, tensors: dict[int, tf.Tensor]) -> Any:
    """Returns `value` with its variables replaced, containers copied."""
    if isinstance(value, tf.Variable):
        return tensors.get(id(value), value)
    if isinstance(value, collections.abc.Mapping):
        return {name: _replaced(item, tensors) for name, item in value.items()}
    if isinstance(value, tuple):
        items = [_replaced(item, tensors) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [_replaced(item, tensors) for item in value]
    return value
