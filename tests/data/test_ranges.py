"""Values that break a rule are named: split, feature, value, rule, example or file."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from mpl import launch
from mpl.data import FileSource, Pipeline, as_source, fingerprint, naming_damage
from mpl.data import pipeline as pipeline_lib
from mpl.data.ranges import checked, fault_in
from mpl.errors import ConfigError, two_lines
from mpl.experiment import Experiment
from mpl.step.state import LossOutput

NAN, INF = float("nan"), float("inf")


def _fault(examples, first=None, **ranges):
    first = None if first is None else tf.constant(first, tf.int64)

    @tf.function
    def traced(examples):
        return checked(examples, ranges=ranges, split="test", first=first)

    texts = set()
    for function in (traced, traced.python_function):
        with pytest.raises(tf.errors.InvalidArgumentError) as error:
            function({name: tf.constant(value) for name, value in examples.items()})
        texts.add(fault_in(error.value).cause)
    (text,) = texts
    return text.removeprefix("Split test: ")


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32", "int64", "float32"])
def test_a_value_out_of_range_is_named(dtype):
    labels = np.array([0, 9, 10, 11], dtype)
    assert _fault({"y": labels}, y=(0, 9)) == "`y` is 10, and must lie in 0 ... 9."
    assert _fault({"y": labels}, first=32, y=(1, 20)) == (
        "`y` is 0 in example 32, and must lie in 1 ... 20.")


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float32, tf.float64])
def test_what_is_not_finite_is_named(dtype):
    values = np.zeros([3, 2, 2], dtype.as_numpy_dtype)
    values[1, 1, 0] = INF
    assert _fault({"x": values}, first=4) == (
        "`x` is inf in example 5, and must be finite.")
    values[0, 1, 1] = NAN
    assert _fault({"x": values}) == "`x` is nan, and must be finite."
    assert _fault({"x": values}, x=(-1, 1)) == "`x` is nan, and must lie in -1 ... 1."


def test_fractions_and_no_upper_end():
    assert _fault({"x": [0.5, -0.25]}, x=(0, INF)) == (
        "`x` is -0.25, and must lie in 0 ... inf.")


def test_good_values_pass_as_they_are():
    examples = {
        "x": tf.constant([[0.5, -0.5]]), "y": tf.constant([9], tf.uint8),
        "s": tf.constant(["a"]), "c": tf.constant([1j]), "b": tf.constant([True])}
    passed = checked(examples, ranges={"y": (0, 9), "x": (-0.5, 0.5)}, split="train")
    assert list(passed) == list(examples)
    for name, value in examples.items():
        assert passed[name].dtype == value.dtype
        np.testing.assert_array_equal(passed[name], value)


def test_a_name_that_no_example_has_is_an_error():
    message = r"`ranges` names \['z'\], and the examples of train hold \['x'\]"
    for data in ({"x": np.zeros(3)},
                 tf.data.Dataset.from_tensor_slices({"x": np.zeros(3)})):
        with pytest.raises(ConfigError, match=message):
            _pipeline(data, z=(0, 1)).dataset()


def test_an_error_of_something_else_is_no_fault():
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        tf.debugging.assert_equal(tf.constant([1]), tf.constant([2]))
    assert fault_in(error.value) is None


def _pipeline(data, size=4, **ranges):
    return Pipeline(
        as_source(data), global_batch_size=size, shuffle=False, repeat=False,
        split="train", ranges=ranges)


@pytest.mark.parametrize("at_once", [1, 2**24])
def test_arrays_are_checked_at_once(monkeypatch, at_once):
    monkeypatch.setattr(pipeline_lib, "_CHECKED_BYTES", at_once)
    labels = np.arange(300) % 10
    assert _pipeline({"y": labels}, y=(0, 9)).num_examples == 300
    labels[271] = 12
    with pytest.raises(ConfigError) as error:
        _pipeline({"y": labels, "x": np.zeros(300)}, y=(0, 9))
    assert error.value.cause == (
        "Split train: `y` is 12 in example 271, and must lie in 0 ... 9.")
    assert _pipeline({"y": labels}).num_examples == 300


@pytest.mark.parametrize("known", [True, False])
def test_datasets_are_checked_when_they_are_read(known):
    arrays = {"x": np.zeros([11, 2], np.float32), "y": np.arange(11)}
    arrays["x"][9, 1] = NAN
    dataset = tf.data.Dataset.from_tensor_slices(arrays)
    if not known:
        dataset = dataset.filter(lambda example: True)
    for ranges, number in [({}, 9), ({"y": (0, 5)}, 6)]:
        pipeline, read = _pipeline(dataset, **ranges), 0
        with pytest.raises(ConfigError, match=f"in example {number}, and must "):
            with naming_damage([pipeline]):
                for read, _ in enumerate(pipeline.dataset(), 1):
                    pass
        assert read == number // 4


def _lines(folder, *files):
    for number, labels in enumerate(files):
        text = "".join(f"{label}\n" for label in labels)
        (folder / f"part-{number}").write_text(text)
    return FileSource(
        folder / "part-*",
        lambda path: tf.data.TextLineDataset(path).map(
            lambda line: {"y": tf.strings.to_number(line)}))


@pytest.mark.parametrize("bad", ["12", "nan", "inf"])
def test_files_are_named(tmp_path, bad):
    source = _lines(tmp_path, range(5), [3, 4, bad, 5])
    pipeline = _pipeline(source, 8, y=(0, 9))
    other = _pipeline({"y": np.zeros(3)})
    message = (f"^File {tmp_path}/part-1 cannot be read after 2 examples: Split train: "
               f"`y` is {bad}, and must lie in 0 ... 9")
    for read in (fingerprint, lambda pipeline: list(pipeline.dataset())):
        with pytest.raises(ConfigError, match=message) as error:
            with naming_damage([other, pipeline]):
                read(pipeline)
        assert len(str(error.value).splitlines()) == 2 and ".." not in (
            error.value.cause.rpartition("9")[2])
    assert len(list(_pipeline(_lines(tmp_path, [1, 2], [3])).dataset())) == 1


class Small(Experiment):
    """A line through two numbers."""

    ranges = {"y": (0, 1)}
    data = {"x": np.ones([8, 2], np.float32), "y": np.arange(8) % 2}

    def build_model(self):
        return keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])

    def build_data(self, split, context):
        return self.data

    def loss(self, batch, training):
        losses = keras.losses.sparse_categorical_crossentropy(
            batch["y"], self.model(batch["x"]), from_logits=True)
        return LossOutput(losses, batch["weight"])


def _run(tmp_path, build_data, **settings):
    experiment = type("Small", (Small,), {"build_data": build_data})
    settings = {"workdir": str(tmp_path / "w"), "train_steps": 6, "policy": "float32",
                "global_batch_size": 4, "summary_every_steps": 0, **settings}
    return launch.run(experiment, **settings)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_run_names_the_split(tmp_path, split):
    empty = {"x": np.zeros([0, 2], np.float32), "y": np.zeros([0], np.int32)}
    nowhere = tf.data.Dataset.from_tensor_slices(Small.data).filter(
        lambda example: example["y"] > 1)
    wrong = {**Small.data, "y": np.full(8, 2)}
    faults = [
        (empty, f"Split {split}: The data has no examples."),
        (nowhere, f"Split {split}: The data has no examples."),
        (wrong, f"Split {split}: `y` is 2 in example 0, and must lie in 0 ... 1."),
        ({"x": [0.0, NAN]},
         f"Split {split}: Array `x` has a NaN or an infinity in record 1."),
    ]
    for data, cause in faults:
        def build_data(self, name, context, data=data):
            return data if name == split else self.data

        with pytest.raises(ConfigError) as error:
            _run(tmp_path, build_data)
        assert error.value.cause == cause
        assert two_lines(error.value).startswith(cause)  # what the program prints
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_a_run_on_a_dataset_stops_at_the_fault(tmp_path):
    wrong = {**Small.data, "y": np.array([0, 1, 0, 1, 0, 1, 7, 0])}

    def build_data(self, split, context):
        data = wrong if split == "train" else self.data
        return tf.data.Dataset.from_tensor_slices(data)

    with pytest.raises(ConfigError) as error:
        _run(tmp_path, build_data)
    assert error.value.cause == (
        "Split train: `y` is 7 in example 6, and must lie in 0 ... 1.")


def test_bad_records_that_no_split_heeds_are_an_error(tmp_path):
    with pytest.raises(ConfigError, match="`max_bad_records` .2. has no effect"):
        _run(tmp_path, lambda self, split, context: self.data, max_bad_records=2)
