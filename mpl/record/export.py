"""SavedModels: a model that predicts without the code that trained it."""

import json
import os
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from mpl.errors import CheckpointError, ConfigError

INFO_FILE = "mpl_export.json"
_ONLY_OUTPUT = "predictions"


def export_saved_model(
    module: Any,
    predict_fn: Callable[[dict[str, tf.Tensor]], Any],
    input_spec: Mapping[str, tf.TensorSpec],
    path: str | os.PathLike[str],
    *,
    run: str,
    info: Mapping[str, Any],
) -> str:
    """Writes a SavedModel whose `serving_default` takes each feature by its name.

    It is written beside `path` and then renamed: a former export stays until the new
    one is whole. On other file systems, such as `gs://`, whose folders are not renamed
    at once, it is deleted first; there `mpl_export.json` is written last.

    Args:
        module: `tf.Module` or Keras model that holds the variables `predict_fn` reads.
        predict_fn: From a dict of batched features to a tensor or a dict of tensors,
            which becomes `{"predictions": tensor}` in the signature.
        input_spec: Shape and dtype of each feature by name, *without* the batch
            dimension, which is free.
        path: The directory to write.
        run: Which run this is; an export of the same run is replaced.
        info: What `mpl_export.json` says besides `run` and versions: the policy, the
            step, names of the metrics.

    Returns:
        `path`.

    Raises:
        ConfigError: `path` exists and is no export of this run.
        CheckpointError: `path` cannot be written.
    """
    path = os.fspath(path)
    if tf.io.gfile.exists(path) and _info(path).get("run") != run:
        cause = f"`path` ({path}) exists and is not an export of this run."
        raise ConfigError(cause, "Choose another path, or delete it first.")

    def serve(**features: tf.Tensor) -> dict[str, tf.Tensor]:
        outputs = predict_fn(features)
        return outputs if isinstance(outputs, dict) else {_ONLY_OUTPUT: outputs}

    specs = {
        name: tf.TensorSpec([None, *spec.shape], spec.dtype, name)
        for name, spec in input_spec.items()
    }
    exported = tf.Module()
    exported.module = module  # a SavedModel holds the variables that its root tracks
    signature = tf.function(serve).get_concrete_function(**specs)
    versions = {library.__name__: library.__version__ for library in (tf, keras, np)}
    is_local = "://" not in path
    beside = f"{path.rstrip('/')}.tmp-{uuid.uuid4().hex[:8]}" if is_local else path
    try:
        if not is_local and tf.io.gfile.exists(path):
            tf.io.gfile.rmtree(path)
        tf.saved_model.save(exported, beside, signatures=signature)
        with tf.io.gfile.GFile(os.path.join(beside, INFO_FILE), "w") as file:
            json.dump({"run": run, **info, "versions": versions}, file, indent=2)
        if is_local:
            old = f"{beside}-old"
            if tf.io.gfile.exists(path):
                tf.io.gfile.rename(path, old)
            tf.io.gfile.rename(beside, path)
            if tf.io.gfile.exists(old):
                tf.io.gfile.rmtree(old)
    except tf.errors.OpError as error:
        reason = error.message or type(error).__name__
        cause = f"The SavedModel `{path}` cannot be written: {reason}."
        remedy = "Choose a path that can be written and has room."
        raise CheckpointError(cause, remedy) from error
    finally:
        if is_local and tf.io.gfile.exists(beside):
            tf.io.gfile.rmtree(beside)
    return path


class SavedPredictor:
    """Predicts with a SavedModel of `export_saved_model`.

    It is called with a dict of arrays `[batch, ...]` by feature name, of any batch size
    above 0; other names, such as a label's, are passed over. It returns an array, or a
    dict of arrays where the model has several outputs.

    Attributes:
        specs: Shape and dtype of each feature by name.

    Raises:
        ConfigError: `path` is no SavedModel; later, a feature is missing or of another
            shape.
        CheckpointError: The SavedModel cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]):
        path = os.fspath(path)
        if not tf.saved_model.contains_saved_model(path):
            cause = f"`path` ({path}) is no SavedModel: it holds no saved_model.pb."
            remedy = "Give the folder that --mode=export wrote; for a run, its class."
            raise ConfigError(cause, remedy)
        try:
            # Kept: a signature alone does not keep its variables alive.
            self._loaded = tf.saved_model.load(path)
            signature = self._loaded.signatures["serving_default"]
        except (tf.errors.OpError, OSError, KeyError) as error:
            cause = f"The SavedModel `{path}` cannot be read: {error}"
            raise CheckpointError(cause, "Export it with --mode=export.") from error
        self._signature = signature
        self.specs: dict[str, tf.TensorSpec] = signature.structured_input_signature[1]

    def __call__(self, batch: Mapping[str, Any]) -> Any:
        specs = self.specs.items()
        tensors = self._signature(**{n: _feature(batch, n, spec) for n, spec in specs})
        outputs = {name: tensor.numpy() for name, tensor in tensors.items()}
        return outputs[_ONLY_OUTPUT] if outputs.keys() == {_ONLY_OUTPUT} else outputs


def _feature(batch: Mapping[str, Any], name: str, spec: tf.TensorSpec) -> tf.Tensor:
    value = np.asarray(batch.get(name))
    fits = spec.shape.is_compatible_with(value.shape) and len(value) > 0
    if fits and spec.dtype.is_integer:  # TensorFlow would wrap around in silence
        fits = np.array_equal(value.astype(spec.dtype.name), value)
    if not fits:
        given = f"{value.dtype} {value.shape}" if name in batch else "missing"
        raise ConfigError(
            f"The feature `{name}` ({given}) must be {spec.dtype.name} {spec.shape}.",
            "Give it as in training: same shape, dtype and range, at least one record.",
        )
    return tf.convert_to_tensor(value, spec.dtype)


def _info(path: str) -> dict[str, Any]:
    """Returns what the JSON of an export says; an empty dict for anything else."""
    try:
        with tf.io.gfile.GFile(os.path.join(path, INFO_FILE)) as file:
            info = json.load(file)
    except (tf.errors.OpError, ValueError):
        return {}
    return info if isinstance(info, dict) else {}
