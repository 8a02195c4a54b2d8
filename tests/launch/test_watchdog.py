"""The watchdog: of fakes that move or do not, and of real processes."""

import threading
import time

import pytest
import tensorflow as tf
from test_preemption import finished, started

from mpl.loop import Trainer, Watchdog


class FakeLoop:
    variant, steps = "", 0

    def progress(self):
        return self.variant, self.steps


@pytest.fixture
def watched(capfd):
    """A function that runs lines under a watchdog of 0.1 s: code, seconds, output."""

    def run(moves):
        codes, ended = [], threading.Event()

        def end(code):
            codes.append(code)
            ended.set()

        dog = Watchdog(0.1, end)
        with dog:
            moves(dog)
            start = time.monotonic()
            ended.wait(3.0)
        return codes, time.monotonic() - start, capfd.readouterr().err

    return run


def steps(dog, loop, count=10):
    for _ in range(count):
        loop.steps += 1
        time.sleep(0.03)


def test_a_loop_that_stops_moving(watched):
    def moves(dog):
        loop = FakeLoop()
        dog.enter("training", loop)
        steps(dog, loop, 20)

    codes, secs, err = watched(moves)
    assert codes == [43] and 0.05 < secs < 0.9
    first, _, stacks = err.partition("\n")
    assert first == "Nothing moved for 0 s in training; what each thread does:"
    assert "most recent call first" in stacks


@pytest.mark.parametrize("count", [0, 1])
def test_what_may_be_compiled_has_ten_times_as_long(count, watched):
    def moves(dog):
        loop = FakeLoop()
        dog.enter("training", loop)
        steps(dog, loop, count)

    codes, secs, _ = watched(moves)
    assert codes == [43] and 0.9 < secs < 2.5


def test_so_has_another_kind_of_step_and_what_has_no_steps(watched):
    def moves(dog):
        loop = FakeLoop()
        dog.enter("training", loop)
        steps(dog, loop)
        loop.variant = "compiled"
        time.sleep(0.5)
        for _ in range(3):
            dog.enter("saving")
            time.sleep(0.3)

    codes, secs, err = watched(moves)
    assert codes == [43] and 0.6 < secs < 2.5
    assert " in saving; " in err


def test_what_may_take_for_ever(watched):
    codes, secs, err = watched(lambda dog: dog.enter(None))
    assert (codes, err) == ([], "") and secs >= 3.0


class Slow(Trainer):
    """A step takes 0.05 s; one graph, as an experiment's."""

    def __init__(self):
        super().__init__(tf.data.Dataset.range(4).repeat())
        self.loop.one_graph = True
        self.total = tf.Variable(0, dtype=tf.int64)

    def train_step(self, iterator):
        def pause(number):
            time.sleep(0.05)
            return number

        number = tf.numpy_function(pause, [next(iterator)], tf.int64)
        self.total.assign_add(number)


def test_steps_are_seen_from_another_thread_while_a_block_runs():
    trainer, seen, done = Slow(), [], threading.Event()
    trainer.train(1)

    def look():
        while not done.wait(0.01):
            start = time.monotonic()
            seen.append(trainer.loop.progress())
            assert time.monotonic() - start < 0.5

    thread = threading.Thread(target=look)
    thread.start()
    trainer.train(20)
    done.set()
    thread.join()
    assert len({progress for progress in seen}) > 10


@pytest.mark.slow
def test_a_step_that_hangs_is_ended_with_the_stacks(tmp_path):
    flags = ["--watchdog_secs=1", "--checkpoint_every_steps=5"]
    with started(tmp_path, *flags, AT="train", PAUSE="1000", FROM="12") as process:
        output = process.stdout.read()
        assert process.wait() == 43, output
    assert output.count("at train") == 12
    said, _, stacks = output.partition("; what each thread does:\n")
    assert said.splitlines()[-1].startswith("Nothing moved for ")
    assert said.endswith("s in training") and "Thread 0x" in stacks
    for function in ("in here", "in _watch", "in train"):
        assert function in stacks, stacks
    assert sorted(path.name for path in tmp_path.glob("checkpoints/*.commit")) == [
        "ckpt-10.commit", "ckpt-5.commit"]


@pytest.mark.slow
def test_a_slow_but_healthy_run_goes_on(tmp_path):
    flags = ["--watchdog_secs=1", "--train_steps=12", "--steps_per_loop=4"]
    output = finished(tmp_path, *flags, AT="save", PAUSE="3", TRACE_SECS="3")
    assert output.count("past save") >= 2 and "accuracy" in output[-1]
