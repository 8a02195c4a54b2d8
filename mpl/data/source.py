"""Where examples come from. An example is a dict of arrays by name."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from mpl.errors import ConfigError

Batch = dict[str, tf.Tensor]
Transform = Callable[[Batch, tf.Tensor], Batch]


class Source:
    """Where examples come from: how many there are, None where that is not known."""

    num_examples: int | None


class ArraySource(Source):
    """Examples in memory, reached by their index.

    Args:
        arrays: one array `[num_examples, ...]` by name. `weight`, where present, is
            float `[num_examples]` ≥ 0: how much the example counts.
        transform: changes a batch, for augmentation: `transform(batch, seed)`, a pure
            function of tensors `[batch, ...]` and an int32 `[2]` seed for `tf.image`'s
            and `tf.random`'s stateless functions, different for each batch. The batch
            is the global one, so that workers' examples are those of one worker: each
            worker changes the whole batch and keeps its part.

    Raises:
        ConfigError: no examples, lengths that differ, objects other than strings, a
            value that is not finite, a weight that is not a float ≥ 0.
    """

    def __init__(
        self, arrays: Mapping[str, np.ndarray], transform: Transform | None = None
    ):
        numpy_arrays = {name: np.asarray(array) for name, array in arrays.items()}
        self.num_examples: int = _check(numpy_arrays)
        num_bytes = sum(
            sum(map(len, array.flat)) if array.dtype.kind == "O" else array.nbytes
            for array in numpy_arrays.values())
        self.example_bytes = num_bytes // self.num_examples
        self.transform = transform
        with tf.device("CPU:0"):  # where tf.data reads it
            self._arrays = {name: tf.constant(a) for name, a in numpy_arrays.items()}

    def gather(self, index: tf.Tensor) -> Batch:
        """The examples at `index` (int64 `[batch]`)."""
        return {name: tf.gather(array, index) for name, array in self._arrays.items()}


class DatasetSource(Source):
    """Examples from a `tf.data.Dataset`, in the dataset's own order in every epoch.

    Position is found by reading and dropping what comes before it. A dataset that
    shuffles without a fixed seed does not resume where it stopped.

    Args:
        dataset: elements are dicts of dense tensors, one example each, not batched.
        num_examples: its length, where the dataset does not know it itself; another
            length is an error when it is read. Several workers need it to evaluate.

    Raises:
        ConfigError: elements that are not dicts of dense tensors, an endless or empty
            dataset.
    """

    def __init__(self, dataset: tf.data.Dataset, num_examples: int | None = None):
        check_elements(dataset)
        cardinality = int(dataset.cardinality())
        if cardinality == 0 or num_examples == 0:
            raise ConfigError(*EMPTY)
        if num_examples is not None:
            check = tf.data.experimental.assert_cardinality(num_examples)
            dataset = dataset.apply(check)
        elif cardinality != tf.data.UNKNOWN_CARDINALITY:
            num_examples = cardinality
        elif not any(True for _ in dataset.take(1)):
            raise ConfigError(*EMPTY)
        self.dataset = dataset
        self.num_examples = num_examples


EMPTY = (
    "The data has no examples.",
    "Look at the data folder; a split that there is not is None.",
)


def check_elements(dataset: tf.data.Dataset) -> None:
    """Checks that a dataset holds examples and ends.

    Raises:
        ConfigError: elements that are not dicts of dense tensors, an endless dataset.
    """
    spec = dataset.element_spec
    parts = spec.values() if isinstance(spec, dict) else []
    if not parts or not all(isinstance(part, tf.TensorSpec) for part in parts):
        raise ConfigError(
            f"A dataset's elements must be dicts of dense tensors, not {spec}.",
            "Give each example as {name: tensor}, not batched.",
        )
    if int(dataset.cardinality()) == tf.data.INFINITE_CARDINALITY:
        raise ConfigError(
            "A dataset that never ends has no epochs.",
            "Leave out `.repeat()`: mpl repeats the training data itself.",
        )


def as_source(data: Any) -> Source:
    """Makes a source of a dict of arrays or a `tf.data.Dataset`.

    A source, as `mpl.FileSource` is one, stays what it is.

    Raises:
        ConfigError: anything else.
    """
    if isinstance(data, Source):
        return data
    if isinstance(data, tf.data.Dataset):
        return DatasetSource(data)
    if isinstance(data, Mapping):
        return ArraySource(data)
    raise ConfigError(
        "Data must be a dict of arrays, a tf.data.Dataset or a source, as "
        f"mpl.FileSource, not {type(data).__name__}.",
        "Return {'image': images, 'label': labels} from `build_data`.",
    )


def _check(arrays: Mapping[str, np.ndarray]) -> int:
    """The number of examples of arrays in which no fault is found."""
    lengths = {name: len(array) if array.ndim else -1 for name, array in arrays.items()}
    if len(set(lengths.values())) > 1 or -1 in lengths.values():
        raise ConfigError(
            f"Arrays must have the same number of examples, not {lengths}.",
            "Give every array as [num_examples, ...].",
        )
    num_examples = next(iter(lengths.values()), 0)
    if not num_examples:
        raise ConfigError(*EMPTY)
    for name, array in arrays.items():
        dtype = _dtype(name, array)
        if dtype.is_floating or dtype.is_complex:
            record = _first(~np.isfinite(array))
            if record is not None:
                raise ConfigError(
                    f"Array `{name}` has a NaN or an infinity in record {record}.",
                    "Repair the record or leave it out.",
                )
        if name == "weight":
            _check_weight(array, dtype)
    return num_examples


def _dtype(name: str, array: np.ndarray) -> tf.DType:
    is_object = array.dtype.kind == "O"  # as TensorFlow gives strings to NumPy
    with contextlib.suppress(TypeError):
        if not is_object or all(isinstance(x, (str, bytes)) for x in array.flat):
            return tf.as_dtype(array.dtype)
    raise ConfigError(
        f"Array `{name}` holds {'Python objects' if is_object else array.dtype}.",
        "Give numbers or strings of one dtype and one shape.",
    )


def _check_weight(array: np.ndarray, dtype: tf.DType) -> None:
    if not dtype.is_floating or array.ndim != 1:
        raise ConfigError(
            f"Array `weight` is {dtype.name} {list(array.shape)}, not a float for each "
            "example.",
            "Give float32 [num_examples], or another name to what is not a weight.",
        )
    record = _first(array < 0)
    if record is not None:
        raise ConfigError(
            f"Array `weight` is negative in record {record} ({array[record]}).",
            "Weights must be 0 or more.",
        )


def _first(faults: np.ndarray) -> int | None:
    """The first record with a fault."""
    return int(np.argwhere(faults)[0, 0]) if faults.any() else None
