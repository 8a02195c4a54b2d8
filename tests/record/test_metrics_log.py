import json
import math

import numpy as np
import pytest
import tensorflow as tf

from mpl.record.metrics_log import MetricsWriter

TRAIN = {
    "loss": 0.25,
    "accuracy": 0.5,
    "loss_scale": 32768.0,
    "applied_steps": 9,
    "skipped_steps": 1,
    "grad_norm": 2.0,
    "learning_rate": 1e-3,
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.jsonl"


@pytest.fixture
def writer(path):
    return MetricsWriter(path, global_batch_size=64, batches_per_epoch=20)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_train_line(path, writer):
    writer.start(0, 100)
    writer.train(10, TRAIN, 50.0)
    rates = {"steps_per_sec": 50.0, "examples_per_sec": 3200.0}
    expected = {"step": 10, "epoch": 0.5, "split": "train", **TRAIN, **rates}
    assert lines_of(path) == [expected]
    assert list(lines_of(path)[0])[:3] == ["step", "epoch", "split"]


def test_evaluation_line_has_the_same_first_fields(path, writer):
    writer.evaluation(20, "validation", {"loss": 0.5, "accuracy": 0.75})
    writer.evaluation(40, "test", {"loss": 0.5, "steps_per_sec": 2.0})
    first, second = lines_of(path)
    assert first == {
        "step": 20,
        "epoch": 1.0,
        "split": "validation",
        "loss": 0.5,
        "accuracy": 0.75,
        "steps_per_sec": None,
        "examples_per_sec": None,
    }
    assert (second["split"], second["examples_per_sec"]) == ("test", 128.0)


def test_each_line_is_on_disk_at_once(path, writer):
    for step in (1, 2, 3):
        writer.train(step, {"loss": 1.0}, None)
        assert len(lines_of(path)) == step
    writer.finish(3)
    assert len(lines_of(path)) == 3


def test_what_is_not_finite_is_null(path, writer):
    values = {"loss": math.nan, "grad_norm": np.float32(np.inf), "accuracy": -math.inf}
    writer.train(1, values, math.inf)
    line = lines_of(path)[0]
    for name in (*values, "steps_per_sec", "examples_per_sec"):
        assert line[name] is None
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()


@pytest.mark.parametrize(
    "value",
    [
        np.float32(0.5),
        np.array(0.5),
        tf.constant(0.5, tf.bfloat16),
    ],
)
def test_takes_scalars_of_any_kind(path, writer, value):
    writer.train(1, {"loss": value}, 1.0)
    assert lines_of(path)[0]["loss"] == 0.5


def test_epoch_is_null_without_a_known_end(path):
    MetricsWriter(path, global_batch_size=1).train(5, {"loss": 1.0}, 1.0)
    assert lines_of(path)[0]["epoch"] is None


def test_resume_drops_later_and_torn_lines(path, writer):
    for step in (10, 20, 30):
        writer.train(step, {"loss": 1.0}, 1.0)
        writer.evaluation(step, "validation", {"loss": 1.0})
    with path.open("a") as file:
        file.write('{"step": 40, "lo')
    writer.start(20, 100)
    assert [line["step"] for line in lines_of(path)] == [10, 10, 20, 20]
    writer.train(30, {"loss": 2.0}, 1.0)
    assert [line["step"] for line in lines_of(path)] == [10, 10, 20, 20, 30]
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]


def test_each_step_and_split_is_there_once(path, writer):
    writer.train(10, {"loss": 3.0}, 1.0)
    writer.evaluation(10, "validation", {"loss": 1.0})
    writer.evaluation(10, "test", {"loss": 1.0})
    again = MetricsWriter(path, global_batch_size=64, batches_per_epoch=20)
    again.start(10, 10)  # a finished run: nothing is trained
    again.evaluation(10, "validation", {"loss": 2.0})
    again.evaluation(10, "test", {"loss": 2.0})
    lines = [(line["split"], line["loss"]) for line in lines_of(path)]
    assert lines == [("train", 3.0), ("validation", 2.0), ("test", 2.0)]


def test_resume_leaves_a_good_file_alone(path, writer):
    writer.train(10, {"loss": 1.0}, 1.0)
    before = path.stat().st_mtime_ns, path.read_text()
    writer.start(10, 100)
    assert (path.stat().st_mtime_ns, path.read_text()) == before
