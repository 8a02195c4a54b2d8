"""What --mode=predict reads and writes."""

import io
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

from mpl.errors import ConfigError
from mpl.experiment import Experiment


def write(
    experiment: Experiment, path: str, goes_on: Callable[[], bool] = lambda: True
) -> int | None:
    """Writes predictions for `batches` to an .npz file; returns how many there are.

    None, and nothing is written, if `goes_on` is false before one of the batches.
    """
    predictor, buffer = experiment.predictor(), io.BytesIO()
    parts = []
    for batch in batches(experiment):
        if not goes_on():
            return None
        parts.append(predictor(batch))
    arrays = tf.nest.map_structure(lambda *part: np.concatenate(part), *parts)
    arrays = arrays if isinstance(arrays, dict) else {"predictions": arrays}
    np.savez(buffer, **arrays)
    with tf.io.gfile.GFile(path, "wb") as file:
        file.write(buffer.getvalue())
    return len(tf.nest.flatten(arrays)[0])


def batches(experiment: Experiment) -> Iterator[dict[str, np.ndarray]]:
    """Yields the examples to predict: those of `--input`, else of the test data."""
    if experiment.config.input is not None:
        yield _read_arrays(experiment.config.input)
        return
    pipelines = experiment.pipelines
    split = next(s for s in ("test", "validation", "train") if s in pipelines)
    left = pipelines[split].num_examples
    for batch in pipelines[split].dataset().as_numpy_iterator():
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
            f"`input` ({path}) must be an .npz file of arrays: {reason}",
            "Write one with numpy.savez(path, name=array).",
        ) from error
