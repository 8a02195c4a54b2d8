"""Goodput over kills, restarts and clocks that go wrong; all times are given."""

import json

import pytest

from mpl.record.goodput import Goodput
from mpl.record.metrics_log import MetricsWriter


class Machine:
    """A clock and a timer; `Goodput` objects are processes, dropped when killed."""

    def __init__(self, path):
        self.path, self.time, self.timer = path, 1_000_000.0, 50.0

    def wait(self, secs):
        self.time += secs
        self.timer += secs

    def process(self):
        self.timer = 7.0  # of this process
        return Goodput(
            self.path, clock=lambda: self.time, timer=lambda: self.timer)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path / "goodput.json")


def figures(line):
    return line["goodput"], line["lost_steps"], line["restarts"]


def test_without_a_restart(machine):
    goodput = machine.process()
    goodput.start(0)
    machine.wait(10)
    assert goodput.train(100, 12.5) == {  # 8 of 10 s
        "goodput": 0.8, "lost_steps": 0, "restarts": 0, "time": 1_000_010.0}
    machine.wait(10)
    assert figures(goodput.train(200, 25.0)) == (0.6, 0, 0)  # and 4 of 10
    machine.wait(5)
    goodput.finish()
    assert str(goodput) == (
        "Goodput 0.48: 12 s productive of 25 s, 0 restarts, 0 steps lost")


def test_a_kill_costs_the_steps_made_again_and_the_time_down(machine):
    first = machine.process()
    first.start(0)
    machine.wait(100)
    first.train(400, 4.0)
    machine.wait(20)  # steps up to 450, which nobody wrote down; then SIGKILL
    machine.wait(30)
    second = machine.process()
    second.start(300)  # from an older checkpoint
    machine.wait(50)
    # 400 steps took 100 s and 200 took 50: of 600 steps in 150 s 500 were kept.
    assert figures(second.train(500, 4.0)) == (pytest.approx(125 / 200), 100, 1)
    machine.wait(1)
    third = machine.process()
    third.start(499)
    machine.wait(300)
    line = third.train(1000, 4.0)
    secs = (150 + 501 / 4) * 1000 / 1101
    assert figures(line) == (pytest.approx(secs / 501), 101, 2)
    assert str(third) == (
        "Goodput 0.50: 250 s productive of 501 s, 2 restarts, 101 steps lost")


def test_killed_before_the_first_report(machine):
    machine.process().start(0)
    machine.wait(40)
    second = machine.process()
    second.start(50)  # a checkpoint was there
    machine.wait(10)
    line = second.train(100, 10.0)
    assert figures(line) == (pytest.approx(10 / 50), 0, 1)  # 5 s measured, for half


def test_killed_in_between_two_writes_counts_once(machine):
    first = machine.process()
    first.start(0)
    machine.wait(10)
    first.train(60, 6.0)
    for restarts in (1, 2, 3):  # each dies right after its start
        last = machine.process()
        last.start(40)
    machine.wait(10)
    assert last.train(80, 6.0)["lost_steps"] == 20
    assert last.train(80, 6.0)["restarts"] == restarts


@pytest.mark.parametrize("jump", [-3600, -2_000_000])
def test_a_clock_set_back_makes_nothing_negative(machine, jump):
    first = machine.process()
    first.start(0)
    machine.wait(10)
    machine.time += jump  # while it runs
    assert figures(first.train(50, 5.0)) == (1.0, 0, 0)
    machine.time += jump  # and while it is down
    second = machine.process()
    second.start(50)
    machine.wait(10)
    line = second.train(100, 10.0)
    assert figures(line) == (0.75, 0, 1)
    assert line["time"] == machine.time


def test_never_above_one(machine):
    first = machine.process()
    first.start(0)
    machine.wait(1)
    assert first.train(50, 5.0)["goodput"] == 1.0  # 10 s in blocks, it is said
    assert first.train(50, None)["goodput"] == 1.0


def test_nothing_measured_is_zero(machine):
    first = machine.process()
    first.start(0)
    assert first.train(0, None)["goodput"] == 0.0
    machine.wait(1)
    assert first.train(10, None)["goodput"] == 0.0


def test_a_run_made_longer_is_not_restarted(machine):
    first = machine.process()
    first.start(0)
    machine.wait(10)
    first.train(100, 20.0)
    first.finish()
    machine.wait(86_400)
    second = machine.process()
    second.start(100)
    machine.wait(10)
    assert figures(second.train(200, 20.0)) == (0.5, 0, 0)
    third = machine.process()  # an error ended the second
    third.start(150)
    assert str(third).endswith("1 restart, 50 steps lost")


def test_training_that_began_before_it_was_measured(machine):
    goodput = machine.process()
    goodput.start(1000)
    machine.wait(10)
    assert figures(goodput.train(1100, 20.0)) == (0.5, 0, 0)


def test_a_file_that_says_nothing_is_begun_anew(machine):
    for text in ("", "{", "7"):
        machine.path.write_text(text)
        goodput = machine.process()
        goodput.start(0)
        assert json.loads(machine.path.read_text())["restarts"] == 0


def test_lines_of_training_hold_it(machine, tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path, global_batch_size=2, goodput=machine.process())
    writer.start(0, 20)
    machine.wait(10)
    writer.train(10, {"loss": 1.0}, 2.0)
    writer.evaluation(10, "validation", {"loss": 2.0})
    again = MetricsWriter(path, global_batch_size=2, goodput=machine.process())
    again.start(5, 20)
    machine.wait(10)
    again.train(10, {"loss": 1.0}, 1.0)
    again.finish(10)
    (line,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert figures(line) == (pytest.approx(10 * 10 / 15 / 20), 5, 1)
    assert (line["time"], line["split"]) == (1_000_020.0, "train")
    assert json.loads(machine.path.read_text())["ended"] is False
