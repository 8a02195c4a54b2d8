import io
import math
import sys

import pytest

from mpl.record.progress import Progress, tracked

TRAIN = {
    "loss": 0.123456,
    "accuracy": 0.98333,
    "loss_scale": 32768.0,
    "applied_steps": 38.0,
    "skipped_steps": 2.0,
    "grad_norm": 1.5,
    "learning_rate": 1e-3,
}
VALIDATION = {"loss": 0.25, "accuracy": 0.975}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def plain():
    return io.StringIO()


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


def test_a_line_in_steps(plain):
    progress = Progress(global_batch_size=64, file=plain)
    progress.start(0, 200)
    progress.train(40, TRAIN, 20.0)
    progress.evaluation(40, "validation", VALIDATION)
    progress.finish(40)
    train, validation = plain.getvalue().splitlines()
    assert train == (
        "step 40/200  loss 0.1235  accuracy 0.9833  1,280 examples/s  ETA 0:00:08"
        "  scale 32,768  skips 2"
    )
    assert validation == "step 40/200  validation: loss 0.25  accuracy 0.975"


def test_one_line_an_epoch_with_both_splits(plain):
    progress = Progress(global_batch_size=64, batches_per_epoch=20, file=plain)
    progress.start(0, 60)
    progress.train(10, TRAIN, 20.0)
    progress.train(20, TRAIN, 20.0)
    progress.evaluation(20, "validation", VALIDATION)
    progress.finish(20)
    first, second = plain.getvalue().splitlines()
    assert first.startswith("epoch 0.5/3  loss 0.1235  accuracy 0.9833  1,280 ex")
    assert second == (
        "epoch 1/3  train: loss 0.1235  accuracy 0.9833"
        " | validation: loss 0.25  accuracy 0.975"
        " | 1,280 examples/s  ETA 0:00:02  scale 32,768  skips 2"
    )


def test_an_epoch_without_validation_gets_its_line(plain):
    progress = Progress(global_batch_size=64, batches_per_epoch=20, file=plain)
    progress.start(0, 60)
    for step in (20, 40, 60):
        progress.train(step, TRAIN, 20.0)
    progress.evaluation(60, "test", VALIDATION)
    progress.finish(60)
    lines = plain.getvalue().splitlines()
    assert [line[:9] for line in lines[:3]] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert all("train: loss 0.1235" in line for line in lines[:3])
    assert "validation" not in plain.getvalue()
    assert lines[3] == "epoch 3/3  test: loss 0.25  accuracy 0.975"


def test_the_last_epoch_is_shown_by_finish(plain):
    progress = Progress(global_batch_size=64, batches_per_epoch=20, file=plain)
    progress.start(0, 20)
    progress.train(20, TRAIN, 20.0)
    assert plain.getvalue() == ""
    progress.finish(20)
    assert plain.getvalue().startswith("epoch 1/1  train: loss 0.1235")


def test_validation_between_log_steps_shows_the_last_train_values(plain):
    progress = Progress(global_batch_size=64, batches_per_epoch=20, file=plain)
    progress.start(0, 40)
    progress.train(15, TRAIN, 20.0)
    progress.evaluation(20, "validation", VALIDATION)
    assert "train: loss 0.1235" in plain.getvalue().splitlines()[1]
    assert "| validation: loss 0.25" in plain.getvalue().splitlines()[1]


def test_evaluation_alone(plain):
    progress = Progress(global_batch_size=64, batches_per_epoch=20, file=plain)
    progress.evaluation(20, "validation", VALIDATION)
    assert plain.getvalue() == "epoch 1  validation: loss 0.25  accuracy 0.975\n"


@pytest.mark.parametrize("speed", [None, 0.0, math.nan, math.inf])
def test_no_speed_no_time_left(plain, speed):
    progress = Progress(global_batch_size=64, file=plain)
    progress.start(0, None)
    progress.train(7, {"loss": math.nan}, speed)
    assert plain.getvalue() == "step 7  loss nan\n"


def test_the_default_is_standard_output(capsys):
    progress = Progress(global_batch_size=64)
    progress.start(0, 2)
    progress.train(1, {"loss": 1.0}, 1.0)
    progress.finish(1)
    assert capsys.readouterr().out == "step 1/2  loss 1  64 examples/s  ETA 0:00:01\n"


def test_a_terminal_gets_one_live_line(terminal):
    pytest.importorskip("rich")
    progress = Progress(global_batch_size=64, batches_per_epoch=20, file=terminal)
    progress.start(0, 40)
    progress.train(10, TRAIN, 20.0)
    progress.train(15, TRAIN, 20.0)
    assert "epoch 0.7/2" in terminal.getvalue()
    assert "\n" not in terminal.getvalue()  # one line, written over and over
    progress.train(20, TRAIN, 20.0)
    progress.evaluation(20, "validation", VALIDATION)
    progress.finish(20)
    output = terminal.getvalue()
    assert output.count("epoch 1/2  train: loss 0.1235") == 1
    assert "| validation: loss 0.25" in output
    assert output.index("\x1b[?25l") < output.rindex("\x1b[?25h")  # the cursor is back


@pytest.mark.parametrize("missing", [True, False])
def test_a_terminal_without_rich_or_movement_gets_plain_lines(
    terminal, monkeypatch, missing
):
    if missing:
        monkeypatch.setitem(sys.modules, "rich.live", None)
    else:
        monkeypatch.setenv("TERM", "dumb")
    progress = Progress(global_batch_size=64, file=terminal)
    progress.start(0, 2)
    progress.train(1, {"loss": 1.0}, 1.0)
    progress.finish(1)
    assert terminal.getvalue() == "step 1/2  loss 1  64 examples/s  ETA 0:00:01\n"


def test_batches_move_a_bar_on_a_terminal_only(terminal, plain, monkeypatch):
    pytest.importorskip("rich")
    for file in (terminal, plain):
        monkeypatch.setattr(sys, "stdout", file)
        assert list(tracked(iter("abcd"), 4, "Predicting")) == list("abcd")
    assert "Predicting" in terminal.getvalue() and "100%" in terminal.getvalue()
    assert plain.getvalue() == ""


def test_batches_without_rich(terminal, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    monkeypatch.setattr(sys, "stdout", terminal)
    assert list(tracked([1, 2], None, "Predicting")) == [1, 2]
    assert terminal.getvalue() == ""
