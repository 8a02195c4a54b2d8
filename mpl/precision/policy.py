"""Which dtype the parameters, the computation and the output of a model have."""

import contextlib
import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import keras
import tensorflow as tf
from absl import logging

from mpl.errors import ConfigError
from mpl.precision import layers as layers_lib
from mpl.precision.cast import cast_floating

_SHORT = {"f16": "float16", "bf16": "bfloat16", "f32": "float32", "full": "float32"}
_SHORT |= {"f64": "float64", "double": "float64"}
_LINE = "params={},compute={},output={}"
_MIXED = {
    "mixed_float16": _LINE.format("float32", "float16", "float32"),
    "mixed_bfloat16": _LINE.format("float32", "bfloat16", "float32"),
}
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
        overrides: pairs (regular expression on a layer's path, name of a policy that
            Keras has too).
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
            f"`policy` ({self.name}) is none that Keras layers can have.",
            "Let params equal compute, or take float32 params and 16-bit compute.")

    def scope(self) -> contextlib.AbstractContextManager:
        """Makes Keras layers created inside follow this policy (`native`: as set).

        Keras keeps its global policy per thread: enter the scope where layers are
        created.
        """
        if self.compute_dtype is None:
            return contextlib.nullcontext()
        return layers_lib.global_dtype_policy(self.keras_name)

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
                    f"The paths are: {', '.join(paths)}.")
            for path, layer in zip(paths, layers):
                if re.search(pattern, path):
                    layers_lib.set_dtype_policy(layer, name)

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
        if self.output_dtype is None:
            return layer
        output = self.output_dtype.name
        return layers_lib.PrecisionWrapper(layer, output, dtype=self.keras_name)


def get_policy(name: str | Policy, overrides: Mapping[str, str] = {}) -> Policy:
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
            cause = f"`overrides` ({pattern!r}) is no regular expression: {error}."
            raise ConfigError(cause, "Write for example '/head$'.") from error
        # What no layer can take is refused here, before a model is built.
        pair = (pattern, get_policy(other).keras_name)
        policy = dataclasses.replace(policy, overrides=(*policy.overrides, pair))
    return policy


def on_tpu() -> bool:
    """Returns whether the current strategy is a TPU's."""
    return isinstance(tf.distribute.get_strategy(), tf.distribute.TPUStrategy)


def auto_policy() -> tuple[str, str]:
    """Chooses a policy by rule, from what the visible devices compute fast.

    TPU, GPUs of compute capability 8 or more, CPU with AVX512-BF16 or AMX-BF16:
    `mixed_bfloat16`. GPUs of 7.x: `mixed_float16`. All else: `float32`. Of several
    GPUs the oldest decides.

    Returns:
        The policy's name, and the reason in words.
    """
    devices = tf.config.get_visible_devices()
    if on_tpu() or any(device.device_type == "TPU" for device in devices):
        return "mixed_bfloat16", "a TPU"
    gpus = [tf.config.experimental.get_device_details(device)
            for device in devices if device.device_type == "GPU"]  # fmt: skip
    if gpus:
        major, minor = min(gpu.get("compute_capability", (0, 0)) for gpu in gpus)
        old = "mixed_float16" if major == 7 else "float32"
        name = "mixed_bfloat16" if major >= 8 else old
        return name, f"a GPU of compute capability {major}.{minor}"
    fast = sorted({"avx512_bf16", "amx_bf16"} & set(_read_cpu_flags().split()))
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
    text = _MIXED.get(text, text)
    words: dict[str, str] = {}
    for part in text.split(",") if "=" in text else [f"params={text}"]:
        key, _, word = (piece.strip() for piece in part.partition("="))
        if word == "half":  # as in jmp: what the device at hand calls half
            tpu = on_tpu() or tf.config.list_physical_devices("TPU")
            word = "bf16" if tpu else "f16"
        key, word = _KEYS.get(key, key), _SHORT.get(word, word)
        if key not in _KEYS.values() or key in words or word not in _SHORT.values():
            where = f": {part!r}" if "=" in str(name) else ""
            raise ConfigError(f"`policy` ({name}) is not known{where}.", _REMEDY)
        words[key] = word
    param = words.get("params", "float32")
    compute = words.get("compute", param)
    output = words.get("output", compute)
    line = _LINE.format(param, compute, output)
    short = {mixed: key for key, mixed in _MIXED.items()}
    text = param if param == compute == output else short.get(line, line)
    return Policy(text, *map(tf.as_dtype, (param, compute, output)))
