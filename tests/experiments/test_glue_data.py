"""GLUE's files in their own layouts, and the metrics of its tasks."""

import numpy as np
import pytest
import tensorflow as tf

import mpl
from experiments.datasets import glue

SST2 = "sentence\tlabel\nhide \"new\" secretions \t0\ncontains no wit\t1\n"
COLA = "gj04\t1\t\tOur friends won't buy it.\ngj04\t0\t*\tThe more he \"reads.\n"
MRPC = ("\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
        "1\t702876\t702977\tHe said \"so\".\tSo he said .\r\n"
        "0\t2108705\t2108831\tIt rose .\tIt fell .\r\n")
LAYOUTS = {
    "sst2": (SST2, [("hide \"new\" secretions ",), ("contains no wit",)], [0, 1]),
    "cola": (COLA, [("Our friends won't buy it.",), ("The more he \"reads.",)], [1, 0]),
    "mrpc": (MRPC, [("He said \"so\".", "So he said ."), ("It rose .", "It fell .")],
             [1, 0]),
}
TESTS = {
    "sst2": ("index\tsentence\n0\tuneasy mishmash\n", [("uneasy mishmash",)]),
    "cola": ("index\tsentence\n0\tBill whistled.\n", [("Bill whistled.",)]),
    "mrpc": ("index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t1\t2\tOne.\tTwo.\n",
             [("One.", "Two.")]),
}


def write(folder, name, text):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(text.encode())
    return str(folder / name)


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_split(name, inner, tmp_path):
    text, texts, labels = LAYOUTS[name]
    folder = tmp_path / glue.TASKS[name].folder if inner else tmp_path
    write(folder, "train.tsv", text)
    write(folder, "dev.tsv", text[:text.rindex("\n", 0, -1) + 1])  # an example less
    got, label = glue.load(str(tmp_path), name, "train")
    assert got == texts and label.tolist() == labels and label.dtype == np.int32
    got, label = glue.load(str(tmp_path), name, "validation")
    assert got == texts[:1] and label.tolist() == labels[:1]
    assert glue.load(str(tmp_path), name, "test") is None


@pytest.mark.parametrize("name", TESTS)
def test_a_file_without_labels(name, tmp_path):
    text, texts = TESTS[name]
    path = write(tmp_path, "test.tsv", text)
    assert glue.read(path, name) == (texts, None)
    assert glue.read_texts(path, name) == texts
    write(tmp_path, "train.tsv", text)
    with pytest.raises(mpl.ConfigError, match="train.tsv has the columns of a test"):
        glue.load(str(tmp_path), name, "train")


@pytest.mark.parametrize("name, text, message", [
    ("sst2", SST2[:-3] + "\n", "line 3 has 1 columns, and must have 2: sentence, "),
    ("sst2", SST2 + "good\tfine\t1\n", "line 4 has 3 columns, and must have 2"),
    ("sst2", SST2 + "good\t2\n", "line 4 has the label '2', and must have 0 or 1"),
    ("sst2", SST2[15:], "line 1 names the columns .* not those of SST-2, .'sentence'"),
    ("sst2", "sentence\tlabel\n", "line 2 is missing: the file has no examples"),
    ("cola", "", "line 1 is missing: the file has no examples"),
    ("cola", COLA[:-23] + "\n", "line 2 has 2 columns, and must have 4: source"),
    ("cola", COLA + "l\tno\t\tYes.\n", "line 3 has the label 'no'"),
    ("mrpc", MRPC[:-12] + "\n", "line 3 has 4 columns, and must have 5: Quality, #1"),
    ("mrpc", MRPC + "-1\t1\t2\ta\tb\n", "line 4 has the label '-1'"),
])
def test_a_bad_file_is_named_by_line(name, text, message, tmp_path):
    path = write(tmp_path, "train.tsv", text)
    with pytest.raises(mpl.ConfigError, match=message) as error:
        glue.load(str(tmp_path), name, "train")
    assert error.value.cause.startswith(f"File {path}, line ")
    assert error.value.remedy.startswith("Take the file from https://gluebenchmark.com")


@pytest.mark.parametrize("name, text", [
    *((name, text) for name, (text, *_) in LAYOUTS.items()),
    *((name, text) for name, (text, _) in TESTS.items())])
def test_a_file_that_is_cut_off_is_named(name, text, tmp_path):
    """Wherever in its last line: often that is a text, of which any part is one."""
    line = text.count("\n")
    for end in range(text.rindex("\n", 0, -1) + 2, len(text)):
        path = write(tmp_path, "test.tsv", text[:end])
        with pytest.raises(mpl.ConfigError) as error:
            glue.read_texts(path, name)
        assert error.value.cause == (
            f"File {path}, line {line} has no end: the file is cut off.")


def test_missing_files_and_tasks_without(tmp_path):
    with pytest.raises(mpl.ConfigError, match="no file .*train.tsv.\n.* of CoLA, from"):
        glue.load(str(tmp_path), "cola", "train")
    with pytest.raises(mpl.ConfigError, match=r"`glue_task` \(cola\) and .* \(None\)"):
        glue.load(None, "cola", "train")
    with pytest.raises(mpl.ConfigError, match=r"`glue_task` \(python\) and `data_dir`"):
        glue.load(str(tmp_path), "python", "train")
    texts, labels = glue.load(None, "python", "validation")
    assert len(texts) == len(labels) == 2 * labels.sum()


def test_lines_of_text(tmp_path):
    path = write(tmp_path, "lines.txt", "One text.\n\nAnother one.\n")
    assert glue.read_texts(path, "sst2") == [("One text.",), ("Another one.",)]
    with pytest.raises(mpl.ConfigError, match="line 1 has 1 texts, and mrpc takes 2"):
        glue.read_texts(path, "mrpc")
    path = write(tmp_path, "pairs.txt", "One.\tTwo.\n")
    assert glue.read_texts(path, "mrpc") == [("One.", "Two.")]


def result_of(metric, *batches):
    for label, decision, weight in batches:
        logits = tf.one_hot(decision, 2)
        metric.update_state(tf.constant(label), logits, sample_weight=weight)
    return float(metric.result())


def test_metrics_by_hand():
    # Of label 0 three are right and one wrong, of label 1 two right and two wrong.
    label, decision = [0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 0, 0]
    whole = label, decision, tf.ones(8)
    matthews = (3 * 2 - 1 * 2) / ((2 + 1) * (2 + 2) * (3 + 1) * (3 + 2)) ** 0.5
    np.testing.assert_allclose(result_of(glue.Matthews(), whole), matthews, rtol=1e-6)
    f1 = 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)  # of precision and recall
    np.testing.assert_allclose(result_of(glue.F1(), whole), f1, rtol=1e-6)
    parts = [(label[:3], decision[:3], tf.ones(3)),
             (label[3:], decision[3:], tf.ones(5)),
             ([1, 1], [0, 0], tf.zeros(2))]  # of weight 0
    np.testing.assert_allclose(result_of(glue.Matthews(), *parts), matthews, rtol=1e-6)
    np.testing.assert_allclose(result_of(glue.F1(), *parts), f1, rtol=1e-6)
    assert result_of(glue.Matthews(), ([0, 0], [0, 0], tf.ones(2))) == 0
    assert result_of(glue.Matthews(), ([0, 1], [1, 0], tf.ones(2))) == -1
    assert result_of(glue.F1(), ([0, 0], [0, 0], tf.ones(2))) == 0


def test_the_metrics_of_each_task():
    names = {name: list(glue.metrics(name)) for name in glue.TASKS}
    assert names == {"python": ["accuracy"], "sst2": ["accuracy"],
                     "cola": ["matthews", "accuracy"], "mrpc": ["accuracy", "f1"]}
