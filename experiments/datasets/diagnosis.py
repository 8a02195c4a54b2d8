"""What labels ask for: one answer of two, one of several, or several of yes and no."""

import numpy as np

import mpl

TASKS = ("binary", "multi_class", "multi_label")


def task_of(label: np.ndarray, task: str, where: str) -> tuple[str, int]:
    """Finds out what labels ask for.

    Args:
        label: integers `[num_examples, columns]` of the training data. One column holds
            classes from 0 on; several hold 0 or 1 each.
        task: what it must be, of TASKS; "auto": what the labels say.
        where: names the data, for messages.

    Returns:
        One of TASKS, and the number of logits: 1 for "binary", of classes for
        "multi_class", of columns for "multi_label".

    Raises:
        ConfigError: the labels are not of that task, or a class has no example.
    """
    columns, classes = label.shape[1], int(label.max()) + 1
    found = "binary" if classes <= 2 else "multi_class"
    if columns > 1:
        found = "multi_label"
    task = found if task == "auto" else task
    fits = {"binary": columns == 1 and classes <= 2, "multi_class": columns == 1}
    if not fits.get(task, True):
        raise mpl.ConfigError(
            f"`task` ({task}) does not go with the labels of {where}: {columns} a "
            f"record, from 0 to {classes - 1}.", f"Use --task={found}.")
    if task != "multi_class":
        return task, columns
    present = np.unique(label[label >= 0])
    gaps = np.flatnonzero(present != np.arange(len(present)))
    if len(gaps):
        record = int(label[:, 0].argmax())
        raise mpl.ConfigError(
            f"{where}: record {record} has label {classes - 1}, and no record label "
            f"{gaps[0]}.",
            "Correct the label, or number the classes from 0 without a gap.")
    return task, classes


def encoded(label: np.ndarray, task: str, num_logits: int, where: str) -> np.ndarray:
    """Returns labels as 0 or 1 for each logit, uint8 `[num_examples, num_logits]`.

    Args:
        label: as above, of any split.
        task, num_logits: from `task_of`.
        where: names the data, for messages.

    Raises:
        ConfigError: a label is out of range, or their number is another.
    """
    one_hot = task == "multi_class"
    columns, most = (1, num_logits - 1) if one_hot else (num_logits, 1)
    if label.shape[1] != columns:
        raise mpl.ConfigError(
            f"{where}: the labels are {label.shape[1]} a record, and {columns} in the "
            "training data.", "Give all splits the same labels.")
    bad = np.argwhere((label < 0) | (label > most))
    if len(bad):
        record, column = bad[0]
        raise mpl.ConfigError(
            f"{where}: record {record} has label {label[record, column]}, and must "
            f"have 0 ... {most}.", "Correct the label, or leave the record out.")
    if one_hot:
        return (label == np.arange(num_logits)).astype(np.uint8)
    return label.astype(np.uint8)


def balanced_weights(label: np.ndarray, task: str) -> np.ndarray:
    """Returns weights that make all classes count the same.

        weight = num_examples / (classes × examples of the class)

    so that the mean over examples is 1.

    Args:
        label: of the training data, from `encoded`.
        task: one of TASKS.

    Returns:
        float32 `[2, num_logits]`: for each logit of an example without and with the
        label; of "multi_class" the second row counts.
    """
    positive = label.sum(0, dtype=np.int64)
    counts = np.stack([len(label) - positive, positive])
    classes = label.shape[1] if task == "multi_class" else 2
    return (len(label) / (classes * np.maximum(counts, 1))).astype(np.float32)
