"""Which dtype the parameters, the computation and the output of a model have."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf
from absl import logging

from mpl.errors import ConfigError
from mpl.precision.cast import cast_floating

_DTYPES = ("float16", "bfloat16", "float32", "float64")
_SHORT = {"f16": "float16", "bf16": "bfloat16", "f32": "float32", "full": "float32"}
_SHORT |= {"f64": "float64", "double": "float64"}
_KEYS = {"p": "params", "c": "compute", "o": "output"}
_REMEDY = (
    "Use float32, float64, bfloat16, float16, mixed_float16, mixed_bfloat16, native, "
    "auto, or a line such as params=float32,compute=bfloat16,output=float32."
)


@dataclasses.dataclass(frozen=True)
class Policy:
    """Three dtypes and the casts to them; `get_policy` makes one from a name.

    Attributes:
        name: the name that `get_policy` reads back to the same three dtypes.
        param_dtype: of the weights that the optimizer updates.
        compute_dtype: of the weights' copies and activations in the forward pass.
        output_dtype: of what the model or the wrapped layer returns. All three are
            None for `native`, which casts nothing.
        overrides: pairs (regular expression on a layer's path, policy name).
    """

    name: str
    param_dtype: tf.DType | None
    compute_dtype: tf.DType | None
    output_dtype: tf.DType | None
    overrides: tuple[tuple[str, str], ...] = ()

    def cast_to_param(self, tree: Any) -> Any:
        """Casts floating leaves to the dtype of the parameters."""
        return cast_floating(tree, self.param_dtype)

    def cast_to_compute(self, tree: Any) -> Any:
        """Casts floating leaves to the dtype of the computation."""
        return cast_floating(tree, self.compute_dtype)

    def cast_to_output(self, tree: Any) -> Any:
        """Casts floating leaves to the dtype of the output."""
        return cast_floating(tree, self.output_dtype)

    @property
    def keras_name(self) -> str:
        """The name of Keras's dtype policy with these weights and computation."""
        param, compute = self.param_dtype, self.compute_dtype
        if compute is not None and param == compute:
            return compute.name
        if param == tf.float32 and compute in (tf.float16, tf.bfloat16):
            return f"mixed_{compute.name}"
        raise ConfigError(
            f"`policy` ({self.name}) has no Keras equal: a Keras layer has weights of "
            "its compute dtype, or float32 weights and a 16-bit compute dtype.",
            "Use one of those, such as mixed_bfloat16 or float32.",
        )

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Makes Keras layers created inside follow this policy (`native`: as set).

        Keras keeps its global policy per thread: enter the scope where layers are
        created.
        """
        former = keras.config.dtype_policy()
        if self.compute_dtype is not None:
            keras.config.set_dtype_policy(self.keras_name)
        try:
            yield
        finally:
            keras.config.set_dtype_policy(former)

    def apply_overrides(self, layers: Iterable[keras.layers.Layer]) -> None:
        """Gives each layer whose path an override matches that override's policy.

        The layers inside a matching layer follow it. Where several overrides match
        a layer, the last one counts.

        Args:
            layers: all layers of a model, nested ones too.

        Raises:
            ConfigError: an expression matches no layer, or a layer already has
                weights of another dtype.
        """
        layers = list(layers)
        for pattern, name in self.overrides:
            # A layer that was never built has no path yet.
            paths = [layer.path or layer.name for layer in layers]
            if not any(re.search(pattern, path) for path in paths):
                raise ConfigError(
                    f"`overrides` ({pattern!r}) matches the path of no layer.",
                    f"The paths are: {', '.join(paths)}.",
                )
            for path, layer in zip(paths, layers):
                if re.search(pattern, path):
                    _set_policy(layer, get_policy(name))

    def wrap(self, layer: keras.layers.Layer) -> keras.layers.Layer:
        """Gives one layer this precision inside a Keras model of another one.

        Inputs are cast to the compute dtype, outputs to the output dtype; the
        layer's weights are tracked and saved with the model. `overrides` belong to
        the whole model and are not used here; `native` returns the layer itself.

        Args:
            layer: a layer, best not built yet.

        Returns:
            A layer to call in its place.
        """
        return layer if self.compute_dtype is None else PrecisionWrapper(layer, self)


@keras.saving.register_keras_serializable(package="mpl")
class PrecisionWrapper(keras.layers.Wrapper):
    """A layer that runs another one under a policy of its own (see `Policy.wrap`)."""

    def __init__(self, layer: keras.layers.Layer, policy: str | Policy, **kwargs):
        policy = get_policy(policy)
        # Keras casts the inputs to the compute dtype of this wrapper's own policy.
        super().__init__(layer, dtype=policy.keras_name, **kwargs)
        self.policy = policy
        self.supports_masking = layer.supports_masking
        _set_policy(layer, policy)

    def build(self, input_shape=None):
        """Does nothing: the layer builds itself when called, with all its inputs."""

    def call(self, inputs, *args, training=None, **kwargs):
        """Runs the layer, which learns `training` from Keras's call context."""
        return self.policy.cast_to_output(self.layer(inputs, *args, **kwargs))

    def compute_mask(self, inputs, previous_mask=None):
        """Returns the layer's own mask, which the cast of its output dropped."""
        return self.layer.compute_mask(inputs, previous_mask)

    def get_config(self):
        """Returns the layer's configuration and the policy's name."""
        config = super().get_config() | {"policy": self.policy.name}
        del config["dtype"]
        return config

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Makes the layer under its policy, so that inner layers get it as well."""
        with get_policy(config["policy"]).scope():
            return super().from_config(config, custom_objects)


def get_policy(name: str | Policy, overrides: Mapping[str, str] | None = None) -> Policy:
    """Makes a policy from its name.

    Args:
        name: a dtype for all three (`float32`, `bfloat16` …); `mixed_float16` or
            `mixed_bfloat16` (float32 parameters and output); jmp's grammar
            `params=float32,compute=bfloat16,output=float32`, or shorter
            `c=bf16`, where params default to float32, compute follows params and
            output follows compute; `native` (no cast at all); `auto` (see
            `auto_policy`); or a policy.
        overrides: policy names by regular expression on a layer's path.

    Returns:
        The policy. Its name is the shortest that says the same.

    Raises:
        ConfigError: a name or an expression cannot be read.

    Source: https://github.com/google-deepmind/jmp
    """
    policy = name if isinstance(name, Policy) else _parse(name)
    for pattern, other in (overrides or {}).items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(
                f"`overrides` ({pattern!r}) is no regular expression: {error}.",
                r"Write for example '.*/head' or '^model/dense_\d'.",
            ) from error
        # What no layer can take is refused here, before a model is built.
        pair = (pattern, get_policy(get_policy(other).keras_name).name)
        policy = dataclasses.replace(policy, overrides=(*policy.overrides, pair))
    return policy


def auto_policy(
    devices: Sequence[tf.config.PhysicalDevice] | None = None,
    *,
    details: Callable[[Any], dict] = tf.config.experimental.get_device_details,
    cpu_flags: str | None = None,
) -> tuple[str, str]:
    """Chooses a policy by rule, from what the devices compute fast.

    TPU, GPUs of compute capability 8 or more, CPU with AVX512-BF16 or AMX-BF16:
    `mixed_bfloat16`. GPUs of 7.x: `mixed_float16`. All else: `float32`. Of several
    GPUs the oldest decides.

    Args:
        devices: the devices to use; all that TensorFlow sees by default.
        details: gives a GPU's details, with `compute_capability`.
        cpu_flags: the processor's flags; read from /proc/cpuinfo by default.

    Returns:
        The policy's name, and the reason in words.
    """
    devices = tf.config.list_physical_devices() if devices is None else devices
    gpus = [device for device in devices if device.device_type == "GPU"]
    if any(device.device_type == "TPU" for device in devices):
        return "mixed_bfloat16", "a TPU"
    if gpus:
        oldest = min(details(gpu).get("compute_capability", (0, 0)) for gpu in gpus)
        reason = f"a GPU of compute capability {oldest[0]}.{oldest[1]}"
        if oldest[0] >= 8:
            return "mixed_bfloat16", reason
        return ("mixed_float16" if oldest[0] == 7 else "float32"), reason
    flags = _read_cpu_flags() if cpu_flags is None else cpu_flags
    fast = sorted({"avx512_bf16", "amx_bf16"} & set(flags.split()))
    if fast:
        return "mixed_bfloat16", f"a CPU with {' and '.join(fast)}"
    return "float32", "a CPU without fast bfloat16"


def _read_cpu_flags() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next((line for line in lines if line.startswith("flags")), "")
    except OSError:  # not Linux
        return ""


def _parse(name: str) -> Policy:
    text = str(name).strip()
    if text == "native":
        return Policy(text, None, None, None)
    if text == "auto":
        text, reason = auto_policy()
        logging.info("policy auto: %s, because of %s", text, reason)
    if text in ("mixed_float16", "mixed_bfloat16"):
        text = f"params=float32,compute={text.removeprefix('mixed_')},output=float32"
    if "=" not in text:
        text = f"params={text}"
    words: dict[str, str] = {}
    for part in text.split(","):
        key, _, word = (piece.strip() for piece in part.partition("="))
        key = _KEYS.get(key, key)
        if key not in _KEYS.values() or key in words:
            raise ConfigError(f"`policy` ({name}) is not known: {part!r}.", _REMEDY)
        words[key] = word
    param = _dtype(words.get("params", "float32"), name)
    compute = _dtype(words.get("compute", param.name), name)
    output = _dtype(words.get("output", compute.name), name)
    if param == compute == output:
        text = param.name
    elif param == output == tf.float32 and compute.size == 2:
        text = f"mixed_{compute.name}"
    else:
        text = f"params={param.name},compute={compute.name},output={output.name}"
    return Policy(text, param, compute, output)


def _dtype(word: str, policy: str) -> tf.DType:
    if word == "half":  # as in jmp: what the device at hand calls half
        word = "bf16" if tf.config.list_physical_devices("TPU") else "f16"
    dtype = _SHORT.get(word, word)
    if dtype not in _DTYPES:
        raise ConfigError(f"`policy` ({policy}) is not known: {word!r}.", _REMEDY)
    return tf.as_dtype(dtype)


def _set_policy(layer: keras.layers.Layer, policy: Policy) -> None:
    """Sets the dtype policy of a layer and of all layers inside it."""
    for inner in _with_sublayers(layer, {}).values():
        for weight in inner.weights:
            dtype = tf.as_dtype(weight.dtype)
            if dtype.is_floating and dtype != policy.param_dtype:
                raise ConfigError(
                    f"`policy` ({policy.name}) cannot hold for {weight.path}, which "
                    f"is {weight.dtype} already.",
                    f"Choose a policy with {weight.dtype} parameters, or give the "
                    "layer its policy before it is built.",
                )
        inner.dtype_policy = policy.keras_name


def _with_sublayers(value: Any, found: dict) -> dict:
    """Collects the layers in a value, its containers and attributes, by identity.

    Keras has no public list of nested layers, and a part such as the softmax inside
    MultiHeadAttention has no path.
    """
    if isinstance(value, keras.layers.Layer):
        if id(value) in found:
            return found
        found[id(value)] = value
        value = vars(value)
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return found
    for part in value:
        _with_sublayers(part, found)
    return found
