"""What --mode=predict reads and writes."""

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
) -> int:
    """Writes predictions to an .npz file, and of image files their names as `file`.

    Args:
        experiment: says what to read, see `examples`.
        path: of the file, which is there as a whole or not at all.
        predictor: from a batch to its predictions.
        specs: as of `examples`.

    Returns:
        How many predictions there are.

    Raises:
        ConfigError: the input cannot be read or holds nothing.
    """
    total, batches, names = examples(experiment, specs)
    parts = [predictor(batch) for batch in progress.counted(batches, total)]
    if not parts:
        cause = f"`input` ({experiment.config.input}) holds no examples."
        raise ConfigError(cause, "Name a file or folder that does.")
    arrays = tf.nest.map_structure(lambda *part: np.concatenate(part), *parts)
    arrays = arrays if isinstance(arrays, dict) else {"predictions": arrays}
    count, buffer = len(tf.nest.flatten(arrays)[0]), io.BytesIO()
    np.savez(buffer, **arrays, **({"file": np.array(names)} if names else {}))
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
        How many there are, where that is known; batches of them; of images the files.
    """
    path, size = experiment.config.input, experiment.config.global_batch_size
    if path is None:
        pipelines = experiment.pipelines
        split = next(s for s in ("test", "validation", "train") if s in pipelines)
        return pipelines[split].num_examples, _of(pipelines[split]), []
    if (own := experiment.read_input(path)) is not None:
        return None, iter(own), []
    if files := _image_files(path):
        specs = specs or experiment.pipelines["train"].dataset().element_spec
        return len(files), _images(experiment, files, specs), files
    arrays = _read_arrays(path)
    count = data.ArraySource(arrays).num_examples
    parts = (slice(start, start + size) for start in range(0, count, size))
    return count, ({n: a[part] for n, a in arrays.items()} for part in parts), []


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


def _images(
    experiment: Experiment, files: Sequence[str], specs: Mapping[str, tf.TensorSpec]
) -> _Examples:
    """Yields images as the one feature `[batch, height, width, channels]`."""
    named = [name for name in specs if specs[name].shape.rank == 4]
    if len(named) != 1:
        raise ConfigError(
            f"`input` is images, and {len(named)} features of an example are.",
            f"Define `{type(experiment).__name__}.read_input`.",
        )
    spec, size = specs[named[0]], experiment.config.global_batch_size
    own = type(experiment).from_pixels is not Experiment.from_pixels
    if spec.dtype != tf.uint8 and not own:
        raise ConfigError(
            f"`input` is images, and those of the training data are {spec.dtype.name}, "
            "in an unknown range.",
            f"Define `{type(experiment).__name__}.from_pixels`.",
        )
    size = size if spec.shape[1:].is_fully_defined() else 1
    for start in range(0, len(files), size):
        images = [_pixels(file, *spec.shape[1:]) for file in files[start:start + size]]
        batch = np.stack([experiment.from_pixels(pixels) for pixels in images])
        yield {named[0]: batch.astype(spec.dtype.as_numpy_dtype)}


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
