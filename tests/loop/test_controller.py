"""The outer loop: what happens when, and what happens when things go wrong."""

import glob
import importlib.util
import os
import random
import signal
import threading

import numpy as np
import pytest
import tensorflow as tf
from absl import logging

from mpl.errors import CheckpointError, ConfigError, NonFiniteError
from mpl.loop import (
    Controller,
    EarlyStopping,
    EndOfDataError,
    Evaluator,
    NewBestMetric,
    Reporter,
    Trainer,
    Watchdog,
)


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Log(Reporter):
    """Writes what happens into a list of events."""

    def __init__(self, events):
        self.events = events

    def start(self, step, total_steps):
        self.events.append(("start", step, total_steps))

    def train(self, step, values, steps_per_sec):
        self.events.append(("log", step, values, steps_per_sec))

    def evaluation(self, step, split, values):
        self.events.append(("evaluation", step, split, values))

    def finish(self, step):
        self.events.append(("finish", step))


class FakeTrainer(Trainer):
    """Counts; a step takes `step_secs`."""

    step_secs = 0.5

    def __init__(self, events, clock=None, data_steps=None, stop_at=None, start=0):
        super().__init__()
        self.global_step = tf.Variable(start, dtype=tf.int64)
        self.events, self.clock = events, clock or Clock()
        self.done, self.ended, self.in_sum = 0, False, 0
        self.data_steps, self.stop_at, self.advance = data_steps, stop_at, 1

    def train_step(self, iterator):
        raise AssertionError("train is overridden")

    def train(self, num_steps=-1):
        step, length = int(self.global_step), int(num_steps)
        limits = [length] + [
            max(limit - step, 0)
            for limit in (self.data_steps, self.stop_at)
            if limit is not None
        ]
        self.done = min(limits)
        self.ended = self.done < length and self.data_steps == step + self.done
        if self.ended and not self.done:
            raise EndOfDataError("no batch", "more data")
        self.clock.now += self.step_secs * self.done
        self.global_step.assign_add(self.advance * self.done)
        self.in_sum += self.done
        self.events.append(("block", step + self.done, self.done))
        return {"loss": tf.constant(2.0), "more": {"norm": tf.constant(3.0)}}

    steps_done = property(lambda self: self.done)
    data_ended = property(lambda self: self.ended)

    def should_stop(self):
        return self.stop_at is not None and self.global_step >= self.stop_at

    def report(self):
        return {"steps_in_sum": self.in_sum}

    def reset_metrics(self):
        self.in_sum = 0


class FakeEvaluator(Evaluator):
    """Gives the values of a list, one after the other; takes 100 seconds."""

    def __init__(self, values, clock=None):
        super().__init__()
        self.values, self.clock = list(values), clock or Clock()

    def eval_step(self, iterator):
        raise AssertionError("evaluate is overridden")

    def evaluate(self, num_steps=-1):
        self.clock.now += 100.0
        value = self.values.pop(0) if len(self.values) > 1 else self.values[0]
        return {"accuracy": tf.constant(value)}

    steps_done = property(lambda self: 50)


class FakeManager:
    """Keeps step numbers."""

    directory = "nowhere"

    def __init__(self, events, global_step):
        self.events, self.global_step = events, global_step

    def save(self, step):
        self.events.append(("save", step))
        return f"ckpt-{step}"

    def restore(self, path=None):
        if path is None:
            return None
        self.global_step.assign(int(path.rpartition("-")[2]))
        return path


def build(start=0, values=(0.5,), trainer=None, **kwargs):
    """Returns a controller of fakes and the list of events."""
    events = [] if trainer is None else trainer.events
    trainer = trainer or FakeTrainer(events, start=start)
    kwargs.setdefault(
        "checkpoint_manager", FakeManager(events, trainer.global_step)
    )
    controller = Controller(
        global_step=trainer.global_step,
        trainer=trainer,
        evaluator=FakeEvaluator(values, trainer.clock),
        reporters=[Log(events)],
        clock=trainer.clock,
        **kwargs,
    )
    return controller, events


@pytest.mark.parametrize("saves", [True, False])
def test_the_last_checkpoint_holds_what_the_last_evaluation_found(saves):
    controller, events = build(
        steps_per_loop=10, checkpoint_every_steps=5, values=(0.5, 0.5))
    if saves:
        controller.train_and_evaluate(10, eval_interval=8)
    else:
        controller.train(10, checkpoint_at_completion=False)
    order = [event[:2] for event in events if event[0] in ("evaluation", "save")]
    assert order == (
        [("save", 5), ("evaluation", 8), ("evaluation", 10), ("save", 10)] if saves
        else [("save", 5), ("save", 10)])


def steps_of(events, kind):
    return [event[1] for event in events if event[0] == kind]


def multiples(first, last, interval):
    return [step for step in range(first + 1, last + 1) if step % interval == 0]


@pytest.mark.parametrize("seed", range(60))
def test_every_interval_is_exact_whatever_the_others(seed):
    """Also after a resume from a step that is a multiple of none."""
    rng = random.Random(seed)
    start, total = rng.choice([0, rng.randint(1, 50)]), rng.randint(51, 130)

    def interval():
        return rng.choice([None, rng.randint(1, 12), rng.randint(10, 200)])

    log, summary, evaluation, checkpoint = (interval() for _ in range(4))
    loop = interval() or 100
    controller, events = build(
        start=start,
        steps_per_loop=loop,
        log_every_steps=log,
        summary_interval=summary,
        summary_dir="unused",
        checkpoint_every_steps=checkpoint,
    )
    summarised = []

    class NoFiles:
        def to(self, split, interval=1):
            return tf.name_scope("")

        def write(self, split, values):
            if split == "train":
                summarised.append(int(controller.global_step))

    controller._summaries = NoFiles()
    controller.train_and_evaluate(total, eval_interval=evaluation)

    blocks = [event for event in events if event[0] == "block"]
    assert sum(length for _, _, length in blocks) == total - start
    ends = {step for _, step, _ in blocks}
    named = [multiples(start, total, n) for n in (
        loop, log, summary, evaluation, checkpoint,
    ) if n]
    assert ends == set().union({total}, *named)

    logs = multiples(start, total, log or loop)
    assert steps_of(events, "log") == sorted({*logs, total})
    assert summarised == multiples(start, total, summary or log or loop)
    for name, n in (("evaluation", evaluation), ("save", checkpoint)):
        expected = multiples(start, total, n) if n else []
        assert steps_of(events, name) == sorted({*expected, total})
    # Metrics cover the steps since the log before, and all steps once.
    covered = [event[2]["steps_in_sum"] for event in events if event[0] == "log"]
    assert np.array_equal(np.cumsum(covered) + start, steps_of(events, "log"))
    assert events[0] == ("start", start, total) and events[-1] == ("finish", total)


def test_at_one_step_log_then_evaluation_then_checkpoint():
    controller, events = build(
        log_every_steps=4, checkpoint_every_steps=4, eval_every_steps=4
    )
    controller.train_and_evaluate(8)
    once = ["block", "log", "evaluation", "save"]
    assert [event[0] for event in events] == ["start", *once, *once, "finish"]


def test_throughput_counts_time_in_training_blocks_only():
    controller, events = build(
        steps_per_loop=5, log_every_steps=20, checkpoint_every_steps=3
    )
    trainer = controller.trainer
    controller.train_actions = (
        lambda _: setattr(trainer.clock, "now", trainer.clock.now + 7.0),
    )
    controller.train_and_evaluate(40, eval_interval=5)  # 100 s each
    rates = [event[3] for event in events if event[0] == "log"]
    assert rates == [2.0, 2.0]
    # A step back does not make it negative, as in Orbit.
    controller.restore_checkpoint("ckpt-10")
    trainer.step_secs = 0.25
    controller.train(20)
    assert [event[3] for event in events if event[0] == "log"][-1] == 4.0
    evaluations = [event[3] for event in events if event[0] == "evaluation"]
    assert all(values["steps_per_sec"] == 0.5 for values in evaluations)


def test_values_come_to_reporters_as_numbers_and_arrays():
    controller, events = build()
    controller.trainer.report = lambda: {
        "count": tf.constant(3, tf.int64),
        "half": tf.constant(1.5, tf.bfloat16),
        "vector": tf.constant([1.0, 2.0]),
    }
    controller.train(1)
    values = next(event[2] for event in events if event[0] == "log")
    np.testing.assert_array_equal(values.pop("vector"), [1.0, 2.0])
    assert values == {"loss": 2.0, "more/norm": 3.0, "count": 3, "half": 1.5}
    assert all(isinstance(value, (int, float)) for value in values.values())


def test_evaluates_where_training_is_complete_already():
    controller, events = build(start=10, values=[0.75])
    assert controller.train_and_evaluate(10) == {"accuracy": 0.75}
    assert [event[0] for event in events] == ["start", "evaluation", "save", "finish"]


@pytest.mark.parametrize("advance", [0, 2])
def test_a_global_step_that_does_not_count_steps_is_an_error(advance):
    controller, events = build()
    controller.trainer.advance = advance
    message = f"`global_step` went from 0 to {5 * advance} in 5 steps.\nAdd 1 to it"
    with pytest.raises(ConfigError, match=message):
        controller.train(5)
    assert not steps_of(events, "save")


def test_a_trainer_that_makes_no_step_is_an_error_not_a_spin():
    controller, _ = build()
    controller.trainer.train = lambda num_steps: {}
    with pytest.raises(ConfigError, match="in 0 steps.\n.* make at least one step"):
        controller.train(-1)


@pytest.mark.parametrize("data_steps", [7, 8])  # in a block, and at its end
def test_trains_to_the_end_of_the_data(data_steps):
    trainer = FakeTrainer([], data_steps=data_steps)
    controller, events = build(trainer=trainer, steps_per_loop=4, log_every_steps=100)
    controller.train_and_evaluate(-1)
    assert events[0] == ("start", 0, None)
    for kind in ("log", "evaluation", "save", "finish"):
        assert steps_of(events, kind) == [data_steps]
    with pytest.raises(EndOfDataError):
        controller.train(-1)


@pytest.mark.parametrize("data_steps", [7, 8])
def test_data_that_end_too_early_are_an_error_and_their_steps_are_saved(data_steps):
    trainer = FakeTrainer([], data_steps=data_steps)
    controller, events = build(trainer=trainer, steps_per_loop=4)
    with pytest.raises(EndOfDataError, match=f"ended after step {data_steps} of 20"):
        controller.train_and_evaluate(20)
    assert steps_of(events, "save") == [data_steps]
    assert not steps_of(events, "evaluation")


def test_should_stop_raises_what_the_trainer_says_and_saves_nothing():
    trainer = FakeTrainer([], stop_at=7)
    controller, events = build(trainer=trainer, steps_per_loop=4)
    trainer.nonfinite_error = lambda: NonFiniteError("At step 7: NaN.", "Less.")
    with pytest.raises(NonFiniteError, match="At step 7"):
        controller.train(20)
    assert not steps_of(events, "save") and events[-1] == ("finish", 4)


@pytest.mark.parametrize("stop_at", [7, 8])
def test_should_stop_without_an_error_ends_training(stop_at):
    trainer = FakeTrainer([], stop_at=stop_at)
    controller, events = build(trainer=trainer, steps_per_loop=4)
    controller.train_and_evaluate(20)
    assert steps_of(events, "save") == steps_of(events, "evaluation") == [stop_at]


def test_a_skip_limit_met_by_the_last_step_of_all_is_an_error_too():
    trainer = FakeTrainer([], stop_at=20)
    controller, events = build(trainer=trainer)
    trainer.nonfinite_error = lambda: NonFiniteError("At step 20: NaN.", "Less.")
    with pytest.raises(NonFiniteError):
        controller.train(20)
    assert not steps_of(events, "save")


def test_early_stopping_ends_training_and_a_resumed_run_stays_ended():
    stopping = EarlyStopping("accuracy", patience=2)
    best, kept = NewBestMetric("accuracy"), []
    controller, events = build(
        values=[0.5, 0.7, 0.6, 0.7, 0.8],
        eval_every_steps=10,
        eval_actions=[lambda output: kept.append(best(output)), stopping],
    )
    controller.train_and_evaluate(100)
    assert steps_of(events, "evaluation") == [10, 20, 30, 40]
    assert steps_of(events, "save") == [40]
    assert kept == [True, True, False, False]
    blocks = len(steps_of(events, "block"))
    controller.train(100)
    assert len(steps_of(events, "block")) == blocks


def test_actions_see_the_output_of_each_block_and_may_stop_training():
    controller, events = build(steps_per_loop=5)
    seen = []

    def action(output):
        seen.append(float(output["loss"]))
        controller.stop_training = len(seen) == 2

    controller.train_actions = (action,)
    controller.train(100)
    assert seen == [2.0, 2.0] and steps_of(events, "save") == [10]


def test_several_evaluators_by_name():
    events, evaluated = [], []
    trainer = FakeTrainer(events)
    controller = Controller(
        global_step=trainer.global_step,
        evaluator={"validation": FakeEvaluator([0.5]), "test": FakeEvaluator([0.25])},
        eval_actions=[evaluated.append],
        reporters=[Log(events)],
    )
    output = controller.evaluate()
    assert output == {"validation": {"accuracy": 0.5}, "test": {"accuracy": 0.25}}
    assert evaluated == [output]
    assert NewBestMetric("test/accuracy").metric_value(output) == 0.25
    assert [event[2] for event in events] == ["validation", "test"]


def interrupting(controller, *at_steps):
    def interrupt(output):
        if int(controller.global_step) in at_steps:
            signal.raise_signal(signal.SIGINT)

    controller.train_actions = (interrupt,)


def test_ctrl_c_finishes_the_block_saves_and_says_so():
    before = signal.getsignal(signal.SIGINT)
    controller, events = build(steps_per_loop=5, log_every_steps=100)
    interrupting(controller, 10)
    with pytest.raises(KeyboardInterrupt, match="after step 10"):
        controller.train_and_evaluate(100)
    for kind in ("log", "save", "finish"):
        assert steps_of(events, kind) == [10]
    assert not steps_of(events, "evaluation")
    assert signal.getsignal(signal.SIGINT) is before
    controller.train_actions = ()
    controller.train(20)  # goes on
    assert steps_of(events, "save") == [10, 20]


def test_a_second_ctrl_c_acts_at_once():
    before = signal.getsignal(signal.SIGINT)
    controller, events = build(steps_per_loop=5)
    interrupting(controller, 5)

    class Hasty(Reporter):
        def train(self, step, values, steps_per_sec):
            signal.raise_signal(signal.SIGINT)

    controller.reporters = (Hasty(), *controller.reporters)
    with pytest.raises(KeyboardInterrupt):
        controller.train(100)
    assert events[-1] == ("finish", 5) and not steps_of(events, "save")
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_and_ignored_interrupts_are_left_alone():
    controller, events = build()
    thread = threading.Thread(target=controller.train, args=(5,))
    thread.start()
    thread.join()
    assert steps_of(events, "save") == [5]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupting(controller, 10)
        controller.train(10)
    finally:
        signal.signal(signal.SIGINT, before)
    assert steps_of(events, "save") == [5, 10]


class Counting(Trainer):
    """A real trainer: adds batches, and says so to TensorBoard if asked."""

    def __init__(self, summarise=False):
        super().__init__(tf.data.Dataset.range(1000, output_type=tf.float32))
        self.global_step = tf.Variable(0, dtype=tf.int64)
        self.total, self.summarise = tf.Variable(0.0), summarise

    def train_step(self, iterator):
        self.total.assign_add(next(iterator))
        self.global_step.assign_add(1)
        if self.summarise:
            tf.summary.scalar("in_step", self.total)

    def train_loop_end(self):
        return {"total": self.total.read_value()}


def objects(trainer):
    return {
        "step": trainer.global_step,
        "total": trainer.total,
        "position": trainer.position,
    }


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    def controller_of(trainer, directory):
        manager = tf.train.CheckpointManager(
            tf.train.Checkpoint(**objects(trainer)), directory, max_to_keep=3
        )
        return Controller(
            global_step=trainer.global_step,
            trainer=trainer,
            checkpoint_manager=manager,
            checkpoint_every_steps=4,
        )

    whole = Counting()
    controller_of(whole, str(tmp_path / "a")).train(13)
    first = Counting()
    controller = controller_of(first, str(tmp_path / "b"))
    assert controller.restore_checkpoint() is None
    controller.train(6)
    second = Counting()
    controller = controller_of(second, str(tmp_path / "b"))
    assert int(second.global_step) == 0  # the constructor restores nothing
    assert controller.restore_checkpoint().endswith("ckpt-6")
    controller.train(13)
    assert float(second.total) == float(whole.total) == sum(range(13))
    names = [os.path.basename(path) for path in glob.glob(f"{tmp_path}/b/*.index")]
    assert sorted(names) == ["ckpt-12.index", "ckpt-13.index", "ckpt-8.index"]


def test_after_restore_is_called_and_nothing_restored_is_saved_again(tmp_path):
    calls = []
    controller, events = build(after_restore=lambda: calls.append(1))
    assert controller.restore_checkpoint() is None and not calls
    assert controller.restore_checkpoint("ckpt-30") == "ckpt-30" and calls == [1]
    controller.train(30)
    assert not steps_of(events, "save")
    assert controller.save_checkpoint() == "ckpt-30"
    assert steps_of(events, "save") == [30]


def test_save_checkpoint_saves_whatever_the_managers_interval(tmp_path):
    trainer = Counting()
    for interval in (None, 4):
        manager = tf.train.CheckpointManager(
            tf.train.Checkpoint(**objects(trainer)),
            str(tmp_path / str(interval)),
            max_to_keep=9,
            step_counter=trainer.global_step,
            checkpoint_interval=interval,
        )
        controller = Controller(
            global_step=trainer.global_step, trainer=trainer, checkpoint_manager=manager
        )
        first = int(trainer.global_step)
        controller.train(first + 9)
        assert controller.save_checkpoint().endswith(f"ckpt-{first + 9}")
        saved = [int(path.rpartition("-")[2]) for path in manager.checkpoints]
        every = multiples(first, first + 9, interval) if interval else []
        assert saved == sorted({*every, first + 9})


def test_restoring_something_else_is_an_error(tmp_path):
    manager = tf.train.CheckpointManager(
        tf.train.Checkpoint(a=tf.Variable(1.0)), str(tmp_path), max_to_keep=1
    )
    manager.save(0)
    trainer = Counting()
    manager = tf.train.CheckpointManager(
        tf.train.Checkpoint(**objects(trainer)), str(tmp_path), max_to_keep=1
    )
    controller = Controller(
        global_step=trainer.global_step, trainer=trainer, checkpoint_manager=manager
    )
    with pytest.raises(AssertionError, match="not bound to checkpointed values"):
        controller.restore_checkpoint()


def test_evaluate_continuously(tmp_path):
    trainer = Counting()
    manager = tf.train.CheckpointManager(
        tf.train.Checkpoint(**objects(trainer)), str(tmp_path), max_to_keep=1
    )
    events = []
    controller = Controller(
        global_step=trainer.global_step,
        evaluator=FakeEvaluator([0.5]),
        checkpoint_manager=manager,
        reporters=[Log(events)],
    )
    with pytest.raises(CheckpointError, match="No checkpoint appeared"):
        controller.evaluate_continuously(timeout=0)
    trainer.global_step.assign(7)
    manager.save(7)
    trainer.global_step.assign(0)

    def written_meanwhile():
        done = len(events) == 2
        if not done:
            trainer.global_step.assign(9)
            manager.save(9)
        return done

    result = controller.evaluate_continuously(timeout=0, timeout_fn=written_meanwhile)
    assert result == {"accuracy": 0.5}
    assert steps_of(events, "evaluation") == [7, 9]


def read_summaries(directory):
    """Returns {tag: [steps]} of the event files in a folder itself."""
    steps = {}
    for path in sorted(glob.glob(os.path.join(directory, "events*"))):
        for record in tf.data.TFRecordDataset(path):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                steps.setdefault(value.tag, []).append(event.step)
    return steps


@pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="tensorboard")
def test_summaries_of_values_and_of_the_step_are_at_the_multiples(tmp_path):
    trainer = Counting(summarise=True)
    evaluator = FakeEvaluator([0.5])
    controller = Controller(
        global_step=trainer.global_step,
        trainer=trainer,
        evaluator={"validation": evaluator},
        steps_per_loop=7,  # blocks do not align with the interval
        log_every_steps=5,
        summary_interval=4,
        summary_dir=str(tmp_path),
    )
    controller.train_and_evaluate(22, eval_interval=10)
    found = read_summaries(tmp_path)
    for tag in ("total", "steps_per_sec", "in_step"):
        assert found[tag] == [4, 8, 12, 16, 20]
    assert read_summaries(tmp_path / "validation")["accuracy"] == [10, 20, 22]


def test_without_tensorboard_one_line_says_what_is_missing(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda *args: warnings.append(args))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    controller, _ = build(summary_dir=str(tmp_path))
    controller.train(5)
    assert warnings == [("No summaries: they need `pip install tensorboard`.",)]
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"log_every_steps": 0}, "`log_every_steps` .0. must be a whole number"),
        ({"steps_per_loop": -1}, "`steps_per_loop` .-1. must be a whole number"),
        ({"summary_interval": 2.5}, "`summary_interval` .2.5. must be a whole number"),
    ],
)
def test_wrong_intervals(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        build(**kwargs)


def test_what_is_missing_is_named():
    step = tf.Variable(0, dtype=tf.int64)
    controller = Controller(global_step=step, evaluator=FakeEvaluator([0.5]))
    with pytest.raises(ConfigError, match="`trainer` is None"):
        controller.train(5)
    for method in (controller.save_checkpoint, controller.evaluate_continuously):
        with pytest.raises(ConfigError, match="`checkpoint_manager` is None"):
            method()
    controller, _ = build()
    controller.evaluator = None
    with pytest.raises(ConfigError, match="`evaluator` is None"):
        controller.train_and_evaluate(5)


def test_a_real_trainer_is_traced_once_in_blocks_of_many_lengths():
    trainer = Counting()
    controller = Controller(
        global_step=trainer.global_step, trainer=trainer, steps_per_loop=7,
        log_every_steps=5, checkpoint_every_steps=11,
    )  # fmt: skip
    controller.train(3)
    controller.train(60)
    trainer.reset_iterator()
    controller.train(90)
    assert trainer.loop._traced.experimental_get_tracing_count() == 1
    assert float(trainer.total) == sum(range(90))


def test_the_watchdog_knows_that_the_next_checkpoint_may_be_long_in_coming(monkeypatch):
    phases = []

    class Listening(Watchdog):
        def enter(self, phase, loop=None):
            phases.append(phase)

    controller, _ = build(watchdog=Listening(None))

    def checkpoints(*_):
        for path in ("ckpt-3", "ckpt-6"):
            yield path
            assert phases[-1] is None

    monkeypatch.setattr(tf.train, "checkpoints_iterator", checkpoints)
    controller.evaluate_continuously(timeout=0)
    one = ["restoring", "evaluation of validation", "actions after an evaluation", None]
    assert phases == 2 * one
