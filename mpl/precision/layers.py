"""Keras layers with a dtype policy of their own."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import keras

from mpl.errors import ConfigError
from mpl.precision.cast import cast_floating


@contextlib.contextmanager
def global_dtype_policy(policy: str) -> Iterator[None]:
    """Changes Keras's global dtype policy for the time of the `with`.

    Keras keeps one per thread: enter it where the layers are made.
    """
    former = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(former)


def set_dtype_policy(
    layer: keras.layers.Layer, policy: str | keras.DTypePolicy
) -> None:
    """Sets the Keras dtype policy of a layer and of all layers inside it.

    Raises:
        ConfigError: a weight exists already and has another dtype.
    """
    policy = keras.DTypePolicy(policy) if isinstance(policy, str) else policy
    for inner in _with_sublayers(layer, {}).values():
        for weight in inner.weights:
            is_float = keras.backend.is_float_dtype(weight.dtype)
            if is_float and weight.dtype != policy.variable_dtype:
                raise ConfigError(
                    f"`policy` ({policy.name}): {weight.path} is {weight.dtype}.",
                    f"Use one with params={weight.dtype}, or set it before the build.")
        inner.dtype_policy = policy


@keras.saving.register_keras_serializable(package="mpl")
class PrecisionWrapper(keras.layers.Wrapper):
    """A layer that runs another one in its own precision (see `Policy.wrap`).

    Args:
        layer: the layer, best not built yet.
        output_dtype: name of the dtype of its floating outputs.
        dtype: its Keras dtype policy; inputs are cast to the compute dtype.
    """

    def __init__(self, layer, output_dtype, dtype=None, **kwargs):
        super().__init__(layer, dtype=dtype, **kwargs)
        self.output_dtype = output_dtype
        self.supports_masking = layer.supports_masking  # or a mask would pass it
        set_dtype_policy(layer, self.dtype_policy)

    def build(self, input_shape=None):
        """Does nothing: the layer builds itself when called, with all its inputs."""

    def call(self, inputs, *args, **kwargs):
        """Runs the layer and casts what it returns."""
        return cast_floating(self.layer(inputs, *args, **kwargs), self.output_dtype)

    def compute_mask(self, inputs, previous_mask=None):
        """Returns the layer's own mask, which the cast of its output dropped."""
        return self.layer.compute_mask(inputs, previous_mask)

    def get_config(self):
        """Returns the arguments of the constructor."""
        return super().get_config() | {"output_dtype": self.output_dtype}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Makes the layer under its policy, so that layers inside it get it too."""
        with global_dtype_policy(keras.dtype_policies.get(config["dtype"])):
            return super().from_config(config, custom_objects)


def _with_sublayers(value: Any, found: dict) -> dict:
    """Collects the layers in a value, its containers and attributes, by identity.

    Keras has no public list of nested layers, and a part such as the softmax inside
    MultiHeadAttention has no path.
    """
    if isinstance(value, keras.layers.Layer) and id(value) not in found:
        found[id(value)] = value
        value = vars(value)
    parts = list(value.values()) if isinstance(value, Mapping) else value
    for part in parts if isinstance(parts, (list, tuple)) else ():
        _with_sublayers(part, found)
    return found
