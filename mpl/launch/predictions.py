"""What --mode=predict reads and writes."""

import functools
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from mpl import data
from mpl.errors import ConfigError
from mpl.experiment import Experiment
from mpl.record import progress

_IMAGES = (".png", ".jpg", ".jpeg", ".bmp")
_Examples = Iterator[Mapping[str, np.ndarray]]


def write(
    experiment: Experiment, path: str, predictor: Callable[[Mapping[str, Any]], Any],
    specs: Mapping[str, tf.TensorSpec] | None = None,
    goes_on: Callable[[], bool] = lambda: True,
) -> int | None:
    """Writes predictions to an .npz file, and of images the names as `image_file`.

    Args:
        experiment: says what to read, see `examples`.
        path: of the file, which is there as a whole or not at all.
        predictor: from a batch to its predictions.
        specs: as of `examples`.
        goes_on: asked before each batch; if false, nothing is written.

    Returns:
        How many predictions there are; None: nothing was written.

    Raises:
        ConfigError: the input cannot be read or holds nothing.
    """
    total, batches, names = examples(experiment, specs)
    parts = []
    for batch in progress.tracked(batches, total, "Predicting"):
        if not goes_on():
            return None
        parts.append(predictor(batch))
    if not parts:
        cause = f"`input` ({experiment.config.input}) holds no examples."
        raise ConfigError(cause, "Name a file or folder that does.")
    arrays = tf.nest.map_structure(lambda *part: np.concatenate(part), *parts)
    arrays = dict(arrays) if isinstance(arrays, dict) else {"predictions": arrays}
    count, buffer = len(tf.nest.flatten(arrays)[0]), io.BytesIO()
    if names:
        arrays["image_file"] = np.array(names)
    np.savez(buffer, allow_pickle=False, **arrays)
    with tf.io.gfile.GFile(f"{path}.tmp", "wb") as file:
        file.write(buffer.getvalue())
    tf.io.gfile.rename(f"{path}.tmp", path, overwrite=True)
    return count


def examples(
    experiment: Experiment, specs: Mapping[str, tf.TensorSpec] | None = None
) -> tuple[int | None, _Examples, Sequence[str]]:
    """Returns the examples to predict: those of `--input`, else of the test data.

    Args:
        experiment: with its settings; without `--input` or `specs` also set up.
        specs: of the features, as a SavedModel has them; None: as in training.

    Returns:
        The number of batches, where that is known; the batches; of images the files.
    """
    path, size = experiment.config.input, experiment.config.global_batch_size
    if path is None:
        pipelines = experiment.pipelines
        split = next(s for s in ("test", "validation", "train") if s in pipelines)
        return pipelines[split].batches_per_epoch, _of(pipelines[split]), []
    if not tf.io.gfile.exists(path):
        cause = f"`input` ({path}) does not exist."
        raise ConfigError(cause, "Correct the path of what is to be predicted.")
    if (own := experiment.read_input(path)) is not None:
        return None, (part for batch in own for part in _parts(batch, size)), []
    if files := _image_files(path):
        specs = specs or experiment.pipelines["train"].dataset().element_spec
        name, spec = _image_feature(experiment, specs)
        parts = _cut(len(files), size if spec.shape[1:].is_fully_defined() else 1)
        read = functools.partial(_images, experiment, spec)
        return len(parts), ({name: read(files[part])} for part in parts), files
    arrays = _read_arrays(path)
    count = data.ArraySource(arrays).num_examples
    return len(_cut(count, size)), _parts(arrays, size), []


def _parts(arrays: Mapping[str, np.ndarray], size: int) -> _Examples:
    for part in _cut(len(next(iter(arrays.values()))), size):
        yield {name: array[part] for name, array in arrays.items()}


def _cut(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


def _of(pipeline: data.Pipeline) -> _Examples:
    left = pipeline.num_examples
    for batch in pipeline.dataset().as_numpy_iterator():
        real = len(batch["weight"])
        if left is None:  # what fills up the last batch has weight 0
            real = int(np.flatnonzero(batch["weight"])[-1]) + 1
        elif left == 0:  # the training data would go on for ever
            return
        else:
            real = min(left, real)
            left -= real
        yield {name: array[:real] for name, array in batch.items()}


def _read_arrays(path: str) -> dict[str, np.ndarray]:
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            content = io.BytesIO(file.read())
        with np.load(content, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:  # NumPy, zipfile, zlib and TensorFlow have their own
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"`input` ({path}) must be an .npz file of arrays, an image, or a folder "
            f"of images: {reason}",
            "Write one with numpy.savez(path, name=array).",
        ) from error


def _image_files(path: str) -> list[str]:
    """Returns the images in a folder in the order of their names, or the path's own."""
    files = [path]
    if tf.io.gfile.isdir(path):
        files = [os.path.join(path, n) for n in sorted(tf.io.gfile.listdir(path))]
    return [file for file in files if file.lower().endswith(_IMAGES)]


def _image_feature(
    experiment: Experiment, specs: Mapping[str, tf.TensorSpec]
) -> tuple[str, tf.TensorSpec]:
    """Returns name and spec of the one feature `[batch, height, width, channels]`."""
    images = {name: spec for name, spec in specs.items() if spec.shape.rank == 4}
    own, what = type(experiment).from_pixels, "not one feature"
    if len(images) == 1:
        ((name, spec),) = images.items()
        if spec.dtype == tf.uint8 or own is not Experiment.from_pixels:
            return name, spec
        what = "in an unknown range"
    raise ConfigError(
        f"`input` ({experiment.config.input}) is images, and those of the training "
        f"data are {what}: {images}.",
        "Define `from_pixels` or `read_input` in the experiment.")


def _images(
    experiment: Experiment, spec: tf.TensorSpec, files: Sequence[str]
) -> np.ndarray:
    images = [experiment.from_pixels(_pixels(file, *spec.shape[1:])) for file in files]
    return np.stack(images).astype(spec.dtype.as_numpy_dtype)


def _pixels(
    file: str, height: int | None, width: int | None, channels: int | None
) -> np.ndarray:
    try:
        with tf.io.gfile.GFile(file, "rb") as opened:
            content = opened.read()
        pixels = tf.io.decode_image(content, channels or 0, expand_animations=False)
    except tf.errors.OpError as error:
        cause = f"`{file}` is no image that can be read: {error.message}"
        raise ConfigError(cause, "Take it out, or save it as PNG anew.") from error
    if (height, width) != pixels.shape[:2] and height and width:
        pixels = tf.image.resize(pixels, [height, width], antialias=True)
    return tf.cast(tf.round(pixels), tf.uint8).numpy()
