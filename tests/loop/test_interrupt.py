"""Signals while a run is under way: what ends, when, and what is left."""

import contextlib
import os
import signal
import threading
import time

import pytest
import tensorflow as tf

from mpl.errors import Preempted
from mpl.loop import Controller, Evaluator, Interrupt, Reporter, Trainer


def pause(number):
    time.sleep(0.02)
    return number


class Slow(Trainer):
    """A step takes 0.02 s."""

    def __init__(self):
        super().__init__(tf.data.Dataset.range(1_000_000))
        self.global_step = tf.Variable(0, dtype=tf.int64)

    def train_step(self, iterator):
        tf.numpy_function(pause, [next(iterator)], tf.int64)
        self.global_step.assign_add(1)


class SlowEvaluator(Evaluator):
    """Counts batches; sends a signal in the n-th."""

    def __init__(self, signal_at=None):
        super().__init__(tf.data.Dataset.range(50))
        self.count = tf.Variable(0, dtype=tf.int64)
        self.signal_at, self.ends = signal_at, 0

    def eval_begin(self):
        self.count.assign(0)

    def look(self, number):
        if number == self.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
            deadline = time.monotonic() + 10
            while not self.loop.halt.numpy() and time.monotonic() < deadline:
                time.sleep(0.01)  # a busy machine: this is the step under way
        return number

    def eval_step(self, iterator):
        tf.numpy_function(self.look, [next(iterator)], tf.int64)
        self.count.assign_add(1)

    def eval_end(self):
        self.ends += 1
        return {"count": self.count}


class Saved:
    """A checkpoint manager that keeps what it would save."""

    def __init__(self, controller=None):
        self.directory, self.states, self.controller = "", {}, controller

    def save(self, step):
        self.states[step] = int(self.controller.evaluation_due)
        return f"ckpt-{step}"


class Log(Reporter):
    def __init__(self):
        self.evaluations = []

    def evaluation(self, step, split, values):
        self.evaluations.append((step, values["count"]))


def build(trainer, **settings):
    manager, log = Saved(), Log()
    controller = manager.controller = Controller(
        global_step=trainer.global_step, trainer=trainer, reporters=[log],
        checkpoint_manager=manager, **settings)
    return controller, manager.states, log.evaluations


@contextlib.contextmanager
def signal_after(secs, number=signal.SIGTERM):
    timer = threading.Timer(secs, os.kill, (os.getpid(), number))
    timer.start()
    yield
    timer.join()


@pytest.mark.parametrize("number, error, said", [
    (signal.SIGTERM, Preempted, "Preempted after step {}."),
    (signal.SIGINT, KeyboardInterrupt, "Interrupted after step {}.")])
def test_a_block_ends_after_the_step(number, error, said):
    before = signal.getsignal(number), signal.set_wakeup_fd(-1)
    trainer = Slow()
    controller, saves, _ = build(trainer, steps_per_loop=100_000)
    controller.train(1)
    with signal_after(0.3, number), pytest.raises(error) as caught:
        controller.train(100_000)
    step = int(trainer.global_step)
    assert 2 < step < 100 and str(caught.value) == said.format(step)
    assert saves == {1: 0, step: 0}
    assert getattr(caught.value, "code", 42) == 42
    assert (signal.getsignal(number), signal.set_wakeup_fd(-1)) == before
    assert not trainer.loop.halt.numpy()
    controller.train(step + 3)  # and goes on
    assert sorted(saves) == [1, step, step + 3]


def test_with_others_a_block_is_not_left():
    trainer = Slow()
    controller, saves, _ = build(trainer, steps_per_loop=20, agree=list)
    controller.train(1)
    with signal_after(0.1), pytest.raises(Preempted, match="after step 20"):
        controller.train(100_000)
    assert saves == {1: 0, 20: 0}


def test_an_evaluation_that_is_broken_off_is_made_after_a_resume():
    trainer, evaluator, outputs = Slow(), SlowEvaluator(signal_at=3), []
    controller, saves, evaluations = build(
        trainer, evaluator=evaluator, steps_per_loop=5, eval_every_steps=5,
        checkpoint_every_steps=5, eval_actions=[outputs.append])
    with pytest.raises(Preempted, match="after step 5"):
        controller.train_and_evaluate(10)
    assert (int(evaluator.count), evaluator.ends) == (4, 0)
    assert (saves, evaluations, outputs) == ({5: 1}, [], [])
    evaluator.signal_at = None
    controller.train_and_evaluate(10)
    assert evaluations == [(5, 50), (10, 50)] and len(outputs) == 2
    assert saves == {5: 1, 10: 0}


def test_so_is_one_that_did_not_begin():
    trainer, evaluator = Slow(), SlowEvaluator()
    controller, saves, evaluations = build(
        trainer, evaluator=evaluator, steps_per_loop=5, eval_every_steps=5)
    controller.train_actions = [lambda output: os.kill(os.getpid(), signal.SIGTERM)]
    with pytest.raises(Preempted, match="after step 5"):
        controller.train_and_evaluate(10)
    assert (saves, evaluations) == ({5: 1}, [])
    controller.train_actions = []
    controller.train_and_evaluate(10)
    assert [step for step, _ in evaluations] == [5, 10]


def test_one_at_the_end_too():
    trainer, evaluator = Slow(), SlowEvaluator(signal_at=3)
    controller, saves, evaluations = build(trainer, evaluator=evaluator)
    with pytest.raises(Preempted, match="after step 2"):
        controller.train_and_evaluate(2)
    assert (saves, evaluations) == ({2: 1}, [])
    evaluator.signal_at = None
    controller.train_and_evaluate(2)
    assert evaluations == [(2, 50)]


def test_a_context_around_several_loops():
    trainer = Slow()
    interrupt = Interrupt([trainer.loop])
    controller, saves, _ = build(trainer, interrupt=interrupt)
    with interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.requested == signal.SIGTERM and interrupt.halted
        assert interrupt.flags == [False, True]
        with pytest.raises(Preempted, match="after step 0"):
            controller.train(100)
    assert saves == {0: 0} and interrupt.requested is None


def test_whose_wakeup_descriptor_it_was_hears_of_signals_too():
    read, write = os.pipe()
    os.set_blocking(write, False)
    former = signal.set_wakeup_fd(write)
    try:
        with Interrupt():
            os.kill(os.getpid(), signal.SIGTERM)
            assert os.read(read, 10) == bytes([signal.SIGTERM])
        assert signal.set_wakeup_fd(write) == write
    finally:
        signal.set_wakeup_fd(former)
        os.close(read)
        os.close(write)


def test_a_forked_process_ends_by_the_signal_and_this_one_hears_nothing():
    interrupt = Interrupt()
    with interrupt:
        if not (pid := os.fork()):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:  # nothing of pytest in the child
                os._exit(0)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM
        time.sleep(0.05)
        assert interrupt.requested is None


def test_no_thread_and_no_descriptor_is_left():
    def open_files():
        return len(os.listdir("/proc/self/fd"))

    before = threading.active_count(), open_files()
    for _ in range(3):
        with Interrupt():
            pass
    assert (threading.active_count(), open_files()) == before
