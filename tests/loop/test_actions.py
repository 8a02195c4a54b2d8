"""Actions: when they act, and that checkpoints hold what they remember."""

import functools
import os

import pytest
import tensorflow as tf

from mpl.errors import ConfigError
from mpl.loop import (
    Conditional,
    EarlyStopping,
    EverySecs,
    EverySteps,
    ExportSavedModel,
    NewBestMetric,
)


def restored(make, original, tmp_path):
    path = tf.train.Checkpoint(action=original).save(str(tmp_path / "ckpt"))
    other = make()
    tf.train.Checkpoint(action=other).restore(path).assert_consumed()
    return other


def test_every_steps_acts_once_a_multiple(tmp_path):
    global_step, calls = tf.Variable(0, dtype=tf.int64), []

    def make():
        return EverySteps(lambda _: calls.append(int(global_step)), 10, global_step)

    action = make()
    for step in (3, 9, 10, 14, 19, 41, 49):
        global_step.assign(step)
        action({})
    assert calls == [10, 41]
    other = restored(make, action, tmp_path)
    other({})
    assert calls == [10, 41]
    global_step.assign(50)
    other({})
    assert calls == [10, 41, 50]


def test_every_secs_acts_by_its_clock():
    now, calls = [100.0], []
    action = EverySecs(calls.append, every_secs=60.0, clock=lambda: now[0])
    for seconds in (100, 159, 160, 200, 219.5, 220.5):
        now[0] = seconds
        action(seconds)
    assert calls == [160, 220.5]


def test_conditional_calls_one_action_or_several():
    calls = []
    Conditional(lambda output: output > 1, calls.append)(2)
    action = Conditional(
        lambda output: output > 1, [calls.append, lambda x: calls.append(-x)]
    )
    action(1)
    action(3)
    assert calls == [2, 3, -3]


@pytest.mark.parametrize(
    "mode, values, bests",
    [
        ("max", [0.5, 0.4, 0.5, 0.6], [True, False, False, True]),
        ("min", [0.5, 0.6, 0.5, 0.4], [True, False, False, True]),
        ("max", [float("nan"), -3.0, float("nan"), 2.0], [False, True, False, True]),
    ],
)
def test_new_best_metric(mode, values, bests, tmp_path):
    best = NewBestMetric("accuracy", mode)
    outputs = [{"accuracy": tf.constant(value, tf.float64)} for value in values]
    assert [best(output) for output in outputs] == bests
    assert best.best_value == values[-1]
    other = restored(lambda: NewBestMetric("accuracy", mode), best, tmp_path)
    assert other.best_value == values[-1]
    assert not other(outputs[-1])


def test_test_does_not_keep_the_best():
    best = NewBestMetric(lambda output: output["loss"], mode="min")
    assert best.test({"loss": 2.0}) and best.test({"loss": 2.0})
    assert best.commit({"loss": 2.0}) and not best.test({"loss": 2.0})


def test_a_metric_of_one_evaluation_set_and_a_wrong_name():
    output = {"validation": {"accuracy": 0.5, "a/b": 3.0}, "a/b": 2.0}
    assert NewBestMetric("validation/a/b").metric_value(output) == 3.0
    assert NewBestMetric("validation/accuracy").metric_value(output) == 0.5
    assert NewBestMetric("a/b").metric_value(output) == 2.0
    with pytest.raises(ConfigError, match="`metric` .test/accuracy. is not in"):
        NewBestMetric("test/accuracy")(output)


def test_the_best_of_a_condition_is_in_the_checkpoint(tmp_path):
    def make():
        return Conditional(NewBestMetric("x"), [lambda _: None, NewBestMetric("y")])

    action = make()
    action({"x": 3.0, "y": 4.0})
    other = restored(make, action, tmp_path)
    assert other.condition.best_value == 3.0
    assert other.action[1].best_value == 4.0


def test_early_stopping_waits_and_remembers(tmp_path):
    stops = []

    def make(patience=2):
        return EarlyStopping("loss", patience, "min", stop=lambda: stops.append(1))

    action = make()
    for loss, stopped in [(3, 0), (4, 0), (2, 0), (2, 0), (float("nan"), 1)]:
        action({"loss": loss})
        assert action.stopped == bool(stopped)
    assert stops == [1] and action.best.best_value == 2.0
    assert restored(make, action, tmp_path).stopped
    # More patience than then lets the run go on.
    assert not restored(lambda: make(patience=3), action, tmp_path).stopped


def test_export_keeps_the_last_versions_whole(tmp_path):
    module = tf.Module()
    module.weight = tf.Variable(0.0)
    module.read = tf.function(lambda: module.weight + 0.0, input_signature=[])
    global_step = tf.Variable(0, dtype=tf.int64)
    action = ExportSavedModel(
        functools.partial(tf.saved_model.save, module),
        tmp_path / "export",
        global_step=global_step,
        max_to_keep=2,
    )
    for step in (9, 80, 700, 700):
        global_step.assign(step)
        module.weight.assign(float(step))
        action({})
    assert sorted(os.listdir(tmp_path / "export")) == ["700", "80"]
    loaded = tf.saved_model.load(str(tmp_path / "export" / "700"))
    assert float(loaded.read()) == 700.0

    def fails(path):
        os.makedirs(path)
        raise RuntimeError("disk full")

    broken = ExportSavedModel(fails, tmp_path / "export", global_step=global_step)
    global_step.assign(800)
    with pytest.raises(RuntimeError):
        broken({})
    action({})
    assert sorted(os.listdir(tmp_path / "export")) == ["700", "800"]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: EverySteps(print, 0, None), "`interval` .0. must be a whole number"),
        (lambda: NewBestMetric("x", "best"), "`mode` .best. must be max or min"),
        (lambda: EarlyStopping("x", 0), "`patience` .0. must be a whole number"),
        (
            lambda: ExportSavedModel(print, "x", global_step=None, max_to_keep=0),
            "`max_to_keep` .0. must be a whole number",
        ),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_conditional_stops_when_its_action_does():
    stopping = EarlyStopping("loss", 1, "min")
    conditional = Conditional(lambda output: True, stopping)
    for loss in (1.0, 2.0):
        assert not conditional.stopped
        conditional({"loss": loss})
    assert conditional.stopped
