"""Tasks of GLUE: SST-2, CoLA and MRPC, as tab-separated files, and their metrics.

`<folder>/train.tsv` and `dev.tsv`, the folder being the task's own or the one that has
it as SST-2, CoLA or MRPC in it. Quotes are literal. Labels are 0 or 1; `test.tsv` has
none. A task of the same form that needs no files, `python`, is made of the running
Python's documentation: is a line Python?

Source: Wang et al. 2018, https://arxiv.org/abs/1804.07461, https://gluebenchmark.com
"""

import dataclasses
import os

import keras
import numpy as np
import tensorflow as tf

import mpl
from experiments.datasets import documentation, text


@dataclasses.dataclass(frozen=True)
class Task:
    """How a task's files look.

    Attributes:
        folder: where they lie in a folder of all tasks.
        columns: of train.tsv and dev.tsv.
        texts: the columns that are read, beside the label.
        label: the column with 0 or 1.
        has_header: whether the first line of train.tsv and dev.tsv names the columns;
            that of test.tsv always does.
    """

    folder: str
    columns: tuple[str, ...]
    texts: tuple[str, ...]
    label: str = "label"
    has_header: bool = True

    @property
    def unlabelled(self) -> tuple[str, ...]:
        """The columns of test.tsv."""
        kept = (name for name in self.columns
                if name in self.texts or name.startswith("#"))
        return ("index", *kept)


_PAIR = ("#1 String", "#2 String")
TASKS = {
    "python": Task("", ("sentence", "label"), ("sentence",)),
    "sst2": Task("SST-2", ("sentence", "label"), ("sentence",)),
    "cola": Task("CoLA", ("source", "label", "mark", "sentence"), ("sentence",),
                 has_header=False),
    "mrpc": Task("MRPC", ("Quality", "#1 ID", "#2 ID", *_PAIR), _PAIR, "Quality"),
}  # fmt: skip
_FILES = {"train": "train.tsv", "validation": "dev.tsv"}


def load(
    folder: str | None, name: str, split: str
) -> tuple[list[tuple[str, ...]], np.ndarray] | None:
    """Reads a split of a task.

    Args:
        folder: of the task's files, or of all tasks; None for `python`.
        name: of the task, one of `TASKS`.
        split: "train" or "validation"; None is returned of others, as test.tsv has no
            labels.

    Returns:
        One or two texts for each example, and int32 labels.

    Raises:
        ConfigError: a file is missing, or not as the task's are.
    """
    if (folder is None) != (name == "python"):
        raise mpl.ConfigError(
            f"`glue_task` ({name}) and `data_dir` ({folder}) do not go together: "
            "python reads no files, the others do.",
            "Name the folder of the files, or the task that they are of.")
    if folder is None:
        lines, labels = documentation.lines(split)
        return [(line,) for line in lines], labels
    if split not in _FILES:
        return None
    inner = os.path.join(folder, TASKS[name].folder)
    path = os.path.join(inner if tf.io.gfile.isdir(inner) else folder, _FILES[split])
    if not tf.io.gfile.exists(path):
        raise mpl.ConfigError(
            f"There is no file {path}.",
            f"--data_dir must hold train.tsv and dev.tsv of {TASKS[name].folder}, from "
            "https://gluebenchmark.com/tasks, or that folder.")
    texts, found = read(path, name)
    if found is None:
        raise mpl.ConfigError(
            f"File {path} has the columns of a test.tsv, without labels.",
            f"Give the {_FILES[split]} of {TASKS[name].folder}.")
    return texts, found


def read(path: str, name: str) -> tuple[list[tuple[str, ...]], np.ndarray | None]:
    """Reads one file of a task; labels are None where it has none, as a test.tsv.

    Raises:
        ConfigError: a line is not as the task's are, or the last one has no end.
    """
    task, lines = TASKS[name], text.read(path).split("\n")
    if lines.pop():  # what comes after the last line's end
        number = len(lines) + 1
        raise _fault(path, number, "has no end: the file is cut off")
    lines = [line.removesuffix("\r") for line in lines]
    first, columns = tuple(lines[0].split("\t")) if lines else (), task.columns
    if first == task.unlabelled:
        columns = task.unlabelled
    elif task.has_header and first != columns:
        raise _fault(path, 1, f"names the columns {list(first)}, and not those of "
                     f"{task.folder}, {list(columns)}")
    start = int(task.has_header or columns != task.columns)
    if len(lines) == start:
        raise _fault(path, start + 1, "is missing: the file has no examples")
    texts, labels = list[tuple[str, ...]](), list[int]()
    for number, line in enumerate(lines[start:], start + 1):
        cells = line.split("\t")
        if len(cells) != len(columns):
            raise _fault(path, number, f"has {len(cells)} columns, and must have "
                         f"{len(columns)}: {', '.join(columns)}")
        cell = dict(zip(columns, cells))
        texts.append(tuple(cell[column] for column in task.texts))
        if task.label in cell:
            if cell[task.label] not in ("0", "1"):
                raise _fault(path, number, f"has the label {cell[task.label]!r}, and "
                             "must have 0 or 1")
            labels.append(int(cell[task.label]))
    return texts, np.array(labels, np.int32) if labels else None


def read_texts(path: str, name: str) -> list[tuple[str, ...]]:
    """Reads texts to be judged: a .tsv file of the task, or lines of text.

    A line holds one text, or the two of a pair with a tab between them.

    Raises:
        ConfigError: a line is not so.
    """
    if path.endswith(".tsv"):
        return read(path, name)[0]
    texts, count = list[tuple[str, ...]](), len(TASKS[name].texts)
    for number, line in enumerate(text.read(path).split("\n"), 1):
        if line.strip():
            texts.append(tuple(line.split("\t")))
            if len(texts[-1]) != count:
                raise mpl.ConfigError(
                    f"File {path}, line {number} has {len(texts[-1])} texts, and "
                    f"{name} takes {count}.", "Put tabs between texts, and only there.")
    return texts


def _fault(path: str, number: int, what: str) -> mpl.ConfigError:
    return mpl.ConfigError(
        f"File {path}, line {number} {what}.",
        "Take the file from https://gluebenchmark.com/tasks anew, or repair the line.")


def metrics(name: str) -> dict[str, keras.metrics.Metric]:
    """Returns the metrics by which a task is judged, the first one first."""
    accuracy = {"accuracy": keras.metrics.SparseCategoricalAccuracy()}
    if name == "cola":
        return {"matthews": Matthews(), **accuracy}
    return {**accuracy, "f1": F1()} if name == "mrpc" else accuracy


class _Counts(keras.metrics.Metric):
    """Sums of weights of examples of two classes, by label and by decision."""

    def __init__(self, name: str | None = None, dtype: str | None = None):
        super().__init__(name=name, dtype=dtype)
        self._counts = self.add_variable((2, 2), "zeros", name="counts")

    def update_state(self, label, logits, sample_weight=None):
        label = tf.cast(tf.reshape(label, [-1]), tf.int32)
        place = 2 * label + tf.argmax(logits, -1, tf.int32)
        each = tf.one_hot(place, 4)
        if sample_weight is not None:
            each *= tf.cast(sample_weight, tf.float32)[:, tf.newaxis]
        self._counts.assign_add(tf.reshape(tf.reduce_sum(each, 0), [2, 2]))

    def _parts(self) -> list[tf.Tensor]:
        """The sums by (label, decision): (0, 0), (0, 1), (1, 0), (1, 1)."""
        return tf.unstack(tf.reshape(tf.convert_to_tensor(self._counts), [4]))


class Matthews(_Counts):
    """Matthews' correlation coefficient, in [-1, 1]; 0 where all is one class.

    Source: Matthews 1975, https://doi.org/10.1016/0005-2795(75)90109-9
    """

    def result(self):
        right_0, wrong_0, wrong_1, right_1 = self._parts()
        scale = ((right_1 + wrong_0) * (right_1 + wrong_1)
                 * (right_0 + wrong_0) * (right_0 + wrong_1))
        return tf.math.divide_no_nan(
            right_0 * right_1 - wrong_0 * wrong_1, tf.sqrt(scale))


class F1(_Counts):
    """The harmonic mean of precision and recall of class 1, in [0, 1]."""

    def result(self):
        _, wrong_0, wrong_1, right_1 = self._parts()
        return tf.math.divide_no_nan(2 * right_1, 2 * right_1 + wrong_0 + wrong_1)
