import json
import math

import numpy as np
import pytest

from mpl.errors import ConfigError
from mpl.record.metrics_log import MetricsWriter
from mpl.tools import runs


def line(step, split="train", **values):
    return json.dumps({"step": step, "epoch": None, "split": split, **values})


@pytest.fixture
def folder(tmp_path):
    """A function that writes a run's folder with this text as its metrics.jsonl."""

    def write(*lines, end="\n", flags=None, name="run"):
        path = tmp_path / name
        path.mkdir()
        (path / "metrics.jsonl").write_text("\n".join(lines) + end)
        if flags is not None:
            (path / "flagfile.txt").write_text(flags)
        return str(path)

    return write


def test_a_run_is_its_flags_and_its_lines(folder):
    path = folder(line(1, loss=2.0), flags="# experiment: digits\n--policy=float32\n")
    run = runs.load(path + "/")
    assert (run.path, run.name, run.flags) == (path, path, {"policy": "float32"})
    assert run.lines == [{"step": 1, "epoch": None, "split": "train", "loss": 2.0}]
    assert runs.load(path, "mine").name == "mine"


def test_curves_are_in_the_order_of_steps_and_null_is_nan(folder):
    run = runs.load(folder(
        line(2, "test", loss=0.5), line(1, "test", loss=None), line(3, "test", f1=[1]),
        line(1, loss=9.0), line(1, "test", loss=0.25)))
    steps, values = run.curve("test", "loss")
    assert steps == [1, 1, 2]
    np.testing.assert_array_equal(values, [math.nan, 0.25, 0.5])
    assert run.curve("test", "f1") == ([], []) and run.curve("eval", "loss") == ([], [])
    assert run.last("test", "loss") == 0.25  # written last
    assert math.isnan(run.last("test", "f1")) and math.isnan(run.last("test", "none"))


def test_time_in_training_is_steps_over_speed(folder):
    run = runs.load(folder(
        line(10, steps_per_sec=5.0), line(20, steps_per_sec=10.0),
        line(20, "validation", steps_per_sec=0.001)))
    np.testing.assert_array_equal(
        run.training_secs([0, 5, 10, 15, 20, 30]), [0, 1, 2, 2.5, 3, 3])
    alone = runs.load(folder(line(20, "test", loss=1.0), name="other"))
    assert np.isnan(alone.training_secs([20])).all()


def test_time_in_training_goes_on_over_a_restart(tmp_path):
    def writer():
        return MetricsWriter(tmp_path / "metrics.jsonl", global_batch_size=1)

    first = writer()
    first.start(0, 30)
    for step, speed in ((10, 5.0), (20, 10.0), (30, 1.0)):
        first.train(step, {"loss": 1.0}, speed)
    again = writer()  # from the checkpoint of step 20: 21 to 30 are lost and redone
    again.start(20, 30)
    again.train(30, {"loss": 1.0}, 2.0)
    run = runs.load(str(tmp_path))
    np.testing.assert_array_equal(run.training_secs([20, 30]), [3, 8])


def test_metrics_are_the_numbers_of_evaluations_the_loss_last(folder):
    first = runs.load(folder(
        line(1, loss=1.0, grad_norm=2.0, learning_rate=0.1, accuracy=0.5),
        line(1, "validation", loss=1.0, accuracy=None, f1=[0.1], steps_per_sec=3.0)))
    assert first.metrics == ["loss", "accuracy"]
    trained = runs.load(folder(
        line(1, loss=1.0, mae=1.0, loss_scale=1.0, goodput=0.5), name="trained"))
    assert trained.metrics == ["loss", "mae"]
    assert runs.common_metrics([first]) == ["accuracy", "loss"]
    assert runs.common_metrics([first, trained]) == ["loss"]
    other = runs.load(folder(line(1, "test", bleu=1.0), name="other"), "other")
    with pytest.raises(ConfigError, match="no metric in common .*; other: bleu"):
        runs.common_metrics([first, other])


def test_the_split_is_the_first_there_is(folder):
    run = runs.load(folder(line(1, loss=1.0), line(1, "test", loss=1.0)))
    assert run.split("validation", "test") == "test"
    assert run.split("validation") == "train"


@pytest.mark.parametrize("end", ['\n{"step": 2, "spl', "\n\x00\x00", "\n", ""])
def test_a_last_line_cut_short_is_passed_over(folder, end):
    run = runs.load(folder(line(1, loss=1.0), end=end))
    assert [n["step"] for n in run.lines] == [1]


def test_a_last_line_without_its_end_of_line_counts(folder):
    run = runs.load(folder(line(1, loss=1.0), line(2, loss=1.0), end=""))
    assert [n["step"] for n in run.lines] == [1, 2]


@pytest.mark.parametrize("damaged", [
    '{"step": 2, "spl', "", "3", '{"step": 2}', '{"step": "2", "split": "train"}',
    "\udcff"])
def test_a_damaged_line_is_named(folder, damaged, tmp_path):
    path = folder(line(1))
    text = "\n".join([line(1), damaged, line(3)]).encode("utf-8", "surrogateescape")
    (tmp_path / "run" / "metrics.jsonl").write_bytes(text)
    with pytest.raises(ConfigError, match=r"Line 2 of `.*/metrics.jsonl` is damaged.*\n"
                       "Delete that line"):
        runs.load(path)


def test_what_is_no_run_is_named(folder, tmp_path):
    with pytest.raises(ConfigError, match="`.*/none` is not .*: there is no such folder"
                       ".\nGive the folder"):
        runs.load(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="it holds no metrics.jsonl"):
        runs.load(str(tmp_path))
    with pytest.raises(ConfigError, match="has no line yet"):
        runs.load(folder('{"step": 1', end=""))
