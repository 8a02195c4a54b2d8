"""--jit_compile: what auto tries, chooses and remembers, and what true computes."""

import json
import os
import pathlib
import subprocess
import sys
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

import mpl
from mpl.distribute import devices
from mpl.launch import jit_trial
from mpl.record.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).parents[2]


class Line(mpl.Experiment):
    """A line between two classes, with small batches and a state."""

    def build_model(self):
        return keras.Sequential([
            keras.Input((3,)), keras.layers.Dense(4, activation="tanh"),
            keras.layers.BatchNormalization(), keras.layers.Dense(2, dtype="float32")])

    def build_data(self, split, context):
        x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
        return {"x": x, "y": (x.sum(1) > 0).astype(np.int32)}

    def loss(self, batch, training):
        logits = self.model(batch["x"], training=training)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(batch["y"], logits)
        return mpl.LossOutput(losses, batch["weight"], (batch["y"], logits))


class NotForXla(Line):
    """XLA knows no strings."""

    def loss(self, batch, training):
        output = super().loss(batch, training)
        number = tf.strings.to_number(tf.strings.as_string(output.per_example))
        return output._replace(
            per_example=output.per_example + 0.0 * tf.stop_gradient(number))


class OwnStep(Line):
    def train_step(self, iterator):
        super().train_step(iterator)


def prepared(kind, strategy, **settings):
    experiment = kind()
    settings = {"global_batch_size": 8, "policy": "float32", **settings}
    experiment.setup(mpl.RunConfig(**{"train_steps": 10**6, **settings}), strategy)
    return experiment


def everything(experiment):
    """Returns the bits of all state by key."""
    values = {"step": experiment.global_step, "batches": experiment.trainer.position}
    values.update(experiment.weights.by_key())
    values.update(experiment.optimizer.export_slots())
    values.update({entry.key: entry.value for entry in experiment.weights.state})
    return {key: np.asarray(value) for key, value in values.items()}


def assert_same(got, want, **tolerance):
    assert got.keys() == want.keys() and len(want) > 8
    compare = np.testing.assert_allclose if tolerance else (
        np.testing.assert_array_equal)
    for key in want:
        compare(got[key], want[key], err_msg=key, **tolerance)


class Timed:
    """A trial in which a step takes the seconds that a test says."""

    def __init__(self, experiment, compiled, uncompiled, switches=()):
        self.now, self.parts, self.remembered = 0.0, [], []
        self._secs = {"compiled": compiled, "": uncompiled}
        self._trainer = experiment.trainer
        self._trial = jit_trial.JitTrial(
            experiment, switches, lambda *found: self.remembered.append(found),
            lambda: self.now)

    def train(self, train, num_steps):
        def timed(count):
            variant = self._trainer.variant
            self.parts.append((count, variant))
            train(count)
            self.now += count * self._secs[variant]

        return self._trial.train(timed, num_steps)


def fake(train_steps):
    """Returns an experiment of which a trial sees enough, and its `train`."""
    step = tf.Variable(0, dtype=tf.int64)
    trainer = types.SimpleNamespace(position=step, variant="", steps_done=0)

    def train(count):
        trainer.steps_done = count
        step.assign_add(count)

    experiment = types.SimpleNamespace(
        global_step=step, trainer=trainer, train_steps=train_steps)
    return experiment, train


@pytest.mark.parametrize("compiled, wins", [(0.2, True), (0.24, False), (1.0, False)])
def test_the_faster_kind_stays_and_uncompiled_in_doubt(compiled, wins):
    experiment, train = fake(10_000)
    trial = Timed(experiment, compiled, 0.25)
    for _ in range(5):
        assert trial.train(train, 20) == 20
    xla, plain = (4, "compiled"), (4, "")
    assert trial.parts == [
        (20, ""), (20, ""), (1, "compiled"), xla, plain, xla, plain,
        (3, "compiled"),  # cut by the end of the block
        plain, xla, plain, xla, plain, (20, "compiled" if wins else "")]
    (switches, why), = trial.remembered
    assert switches[:3] == [(0, False), (40, True), (45, False)]
    assert [kind for _, kind in switches] == [False, True] * 5 + [False] + [True] * wins
    words = f"{1e3 * compiled:.4g} ms a step compiled, 250 uncompiled, {compiled:.1f} s"
    assert words in why


def test_what_is_left_must_repay_it():
    for total, tried in ((20 + 2_399, False), (20 + 2_400, True)):
        experiment, train = fake(total)
        trial = Timed(experiment, 0.1, 0.25)
        for _ in range(4):
            trial.train(train, 10)
        assert ("compiled" in [variant for _, variant in trial.parts]) is tried
        assert not trial.remembered  # nothing yet, or nothing at all


def test_the_end_of_a_part_before_its_time_ends_the_block():
    experiment, _ = fake(10_000)
    trial = jit_trial.JitTrial(experiment)

    def stops_after_three(count):
        experiment.trainer.steps_done = 3

    assert trial.train(stops_after_three, 20) == 3


def test_xla_may_fail_without_a_word():
    experiment, train = fake(10_000)
    experiment.trainer.reset_iterator = lambda position: None
    trial = Timed(experiment, 0.1, 0.25)

    def fails(count):
        if experiment.trainer.variant == "compiled":
            raise NotImplementedError
        train(count)

    for _ in range(3):
        assert trial.train(fails, 20) == 20
    (switches, why), = trial.remembered
    assert why == "XLA failed: NotImplementedError" and not switches[-1][1]


def test_an_error_of_training_is_raised():
    experiment, _ = fake(10_000)
    trial = jit_trial.JitTrial(experiment)

    def fails(count):
        raise ValueError("bad record")

    with pytest.raises(ValueError, match="bad record"):
        trial.train(fails, 20)
    assert experiment.trainer.variant == ""


@pytest.mark.slow
def test_a_trial_computes_what_training_computes_and_repeats_its_bits(
    strategy_of, tmp_path
):
    tried = prepared(Line, strategy_of(1))
    tried.trainer.jit_trial = trial = Timed(tried, 0.1, 1.0)
    for _ in range(4):
        tried.trainer.train(tf.constant(10, tf.int64))
        assert tried.trainer.steps_done == 10
    (switches, _), = trial.remembered
    assert switches[0] == (0, False) and switches[-1][1]
    plain = prepared(Line, strategy_of(1))
    plain.trainer.train(40)
    assert_same(everything(tried), everything(plain), rtol=1e-4, atol=1e-6)

    # Stopped in the midst of the trial, and gone on with after it.
    first = prepared(Line, strategy_of(1))
    first.trainer.jit_trial = Timed(first, 1, 1, json.loads(json.dumps(switches)))
    first.trainer.train(24)
    Checkpoints(
        tmp_path, asynchronous=False, **first.checkpoint_objects()).save(24)
    rest = prepared(Line, strategy_of(1))
    Checkpoints(tmp_path, **rest.checkpoint_objects()).resume()
    rest.after_restore()
    rest.trainer.jit_trial = again = Timed(rest, 1, 1, json.loads(json.dumps(switches)))
    rest.trainer.train(16)
    assert {variant for _, variant in again.parts} == {"compiled", ""}
    assert not again.remembered
    assert_same(everything(rest), everything(tried))


def test_what_xla_cannot_compile_is_trained_uncompiled(strategy_of, monkeypatch):
    said = []
    monkeypatch.setattr(jit_trial.logging, "info", lambda *words: said.append(words))
    tried, plain = (prepared(NotForXla, strategy_of(1)) for _ in range(2))
    tried.trainer.jit_trial = trial = Timed(tried, 0.1, 0.5)
    for _ in range(4):
        tried.trainer.train(10)
        plain.trainer.train(10)
        assert tried.trainer.steps_done == 10
    assert trial.parts == [(10, ""), (10, ""), (1, "compiled"), (10, ""), (10, "")]
    (switches, why), = trial.remembered
    assert not switches[-1][1] and "XLA failed: " in why and "\n" not in why
    assert len(said) == 1
    assert_same(everything(tried), everything(plain))
    values = (e.train_report()["loss"] for e in (tried, plain))
    assert next(values) == next(values)


@pytest.mark.parametrize("kind, replicas, settings, reason", [
    (Line, 2, {}, "2 replicas"), (OwnStep, 1, {}, "its own `train_step`"),
    (Line, 1, {"debug_eager": True}, "--debug_eager"),
    (Line, 1, {"deterministic": True}, "--deterministic"),
    (Line, 1, {"jit_compile": True}, None), (Line, 1, {"jit_compile": False}, None),
])
def test_where_nothing_is_tried(
    kind, replicas, settings, reason, strategy_of, tmp_path, monkeypatch
):
    said = []
    monkeypatch.setattr(
        jit_trial.logging, "info", lambda *words: said.append(words[0] % words[1:]))
    experiment = prepared(kind, strategy_of(replicas), **settings)
    assert jit_trial.trial_of(experiment, str(tmp_path)) is None
    want = f"jit_compile auto: uncompiled, because of {reason}"
    assert said == [want] * (reason is not None)


def test_a_choice_is_remembered_for_its_model_and_device(
    strategy_of, tmp_path, monkeypatch
):
    said, used = [], []
    monkeypatch.setattr(
        jit_trial.logging, "info", lambda *words: said.append(words[0] % words[1:]))

    def switches(**settings):
        experiment = prepared(Line, strategy_of(1), **settings)
        monkeypatch.setattr(jit_trial, "JitTrial", lambda *args: used.append(args))
        jit_trial.trial_of(experiment, str(tmp_path))
        return used[-1][1]

    assert switches() == [] and not said
    used[-1][2]([(0, False), (7, True)], "0.1 s of compilation")  # what a trial does
    assert switches() == [[0, False], [7, True]]
    assert said == ["jit_compile auto: compiled, as measured before: "
                    "0.1 s of compilation"]
    assert switches(global_batch_size=4) == []
    assert switches(policy="mixed_bfloat16") == []
    used[-1][2]([(0, False)], "why")
    assert switches() == [[0, False], [7, True]]  # both are kept
    monkeypatch.setattr(tf, "__version__", "3.0")
    assert switches() == []
    (tmp_path / jit_trial.FILE).write_text("{")
    assert switches() == []


def test_the_device_of_a_choice_is_the_one_that_trains(strategy_of, monkeypatch):
    """Not one that is there and hidden: --visible_devices=cpu, or =1."""
    experiment, there = prepared(Line, strategy_of(1)), ["H200", "T4"]
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: there)
    monkeypatch.setattr(
        tf.config.experimental, "get_device_details", lambda gpu: {"device_name": gpu})
    keys = []
    for visible in (there, ["H200"], ["T4"], []):
        monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: visible)
        keys.append(jit_trial._key(experiment).split("; ")[0])
    assert keys == ["H200", "H200", "T4", devices.describe_cpu()]


def test_a_folder_that_takes_no_file_is_no_error(strategy_of, tmp_path, monkeypatch):
    warned, used = [], []
    monkeypatch.setattr(
        jit_trial.logging, "warning", lambda *words: warned.append(words))
    monkeypatch.setattr(jit_trial, "JitTrial", lambda *args: used.append(args))
    jit_trial.trial_of(prepared(Line, strategy_of(1)), str(tmp_path / "none" / "such"))
    used[0][2]([(0, False)], "why")
    assert len(warned) == 1


def test_a_run_says_that_it_is_too_short(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(
        jit_trial.logging, "info", lambda *words: said.append(words[0] % words[1:]))
    mpl.run(Line, train_steps=6, steps_per_loop=2, global_batch_size=8, mode="train",
            policy="float32", workdir=str(tmp_path))
    line, = (words for words in said if "jit_compile" in words)
    assert "uncompiled, the 0 s left would not repay a trial" in line
    assert not (tmp_path / jit_trial.FILE).exists()


@pytest.mark.slow
def test_a_run_tries_and_goes_on_with_its_choice(tmp_path, monkeypatch):
    said, settings = [], dict(
        steps_per_loop=10, global_batch_size=8, mode="train", policy="float32")
    monkeypatch.setattr(jit_trial, "REPAYS_SECS", 0.0)
    monkeypatch.setattr(
        jit_trial.logging, "info", lambda *words: said.append(words[0] % words[1:]))
    for steps in (200, 220):
        mpl.run(Line, train_steps=steps, workdir=str(tmp_path), **settings)
    first, second = (words for words in said if "jit_compile" in words)
    (choice,) = json.loads((tmp_path / jit_trial.FILE).read_text()).values()
    assert first.endswith(choice["why"]) and "s of compilation" in choice["why"]
    assert second == first.replace("compiled, ", "compiled, as measured before: ", 1)


class Overflowing(Line):
    """Every third batch has an infinite loss."""

    def build_data(self, split, context):
        arrays = super().build_data(split, context)
        rows = tf.data.Dataset.from_tensor_slices(arrays)
        return mpl.DatasetSource(rows.enumerate().map(self.poison), 40)

    def poison(self, number, row):
        bad = tf.where((number // 8) % 3 == 2, np.float32(0), np.float32(1))
        return {**row, "divisor": bad}

    def loss(self, batch, training):
        output = super().loss(batch, training)
        return output._replace(per_example=output.per_example / batch["divisor"])


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_compiled_steps_compute_the_same_and_skips_change_nothing(
    policy, strategy_of
):
    kinds = [prepared(Overflowing, strategy_of(1), policy=policy, jit_compile=jit)
             for jit in (True, False)]
    skipped = 0
    for _ in range(9):
        before = everything(kinds[0])
        for experiment in kinds:
            experiment.trainer.train(1)
        after, report = everything(kinds[0]), kinds[0].train_report()
        if report["skipped_steps"] > skipped:
            skipped = report["skipped_steps"]
            for key in before.keys() - {"step", "batches"}:
                np.testing.assert_array_equal(after[key], before[key], err_msg=key)
    reports = [experiment.train_report() for experiment in kinds]
    assert reports[0]["skipped_steps"] == reports[1]["skipped_steps"] == skipped > 0
    assert reports[0]["loss_scale"] == reports[1]["loss_scale"]
    tolerance = 1e-5 if policy == "float32" else 2e-3
    assert_same(*map(everything, kinds), rtol=tolerance, atol=tolerance)
    first, second = (experiment.optimizer for experiment in kinds)
    assert first.nonfinite_report() == second.nonfinite_report()


@pytest.mark.slow
def test_a_compiled_step_is_compiled_once(tmp_path):
    """XLA compiles anew for each value that shapes depend on, such as a slice's."""
    code = """
import sys
sys.path[:0] = ["tests/launch", "tests"]
import tensorflow as tf, test_jit_trial as t
experiment = t.prepared(
    t.Line, tf.distribute.OneDeviceStrategy("CPU:0"), jit_compile=True)
for _ in range(3):
    experiment.trainer.train(2)
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS":
           f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True,
                   capture_output=True)
    modules = list(tmp_path.glob("*before_optimizations.txt"))
    assert len(modules) == 1, modules
