"""One run of an experiment: intervals, hints, the last line, every mode."""

import dataclasses
import json
import os

import keras
import numpy as np
import pytest
import tensorflow as tf

from mpl import launch
from mpl.errors import CheckpointError, ConfigError
from mpl.experiment import Experiment
from mpl.launch import session, workdir
from mpl.launch.config import RunConfig
from mpl.launch.guide import Guide
from mpl.step.state import LossOutput

X = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
Y = (X.sum(axis=1) > 0).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    train_epochs = 3
    global_batch_size = 8
    learning_rate = 0.1
    policy = "float32"
    summary_every_steps = 0


class Line(Experiment):
    """A line between two classes; 20 examples, 3 steps an epoch."""

    Config = Config

    def head(self, units):
        return keras.layers.Dense(units, dtype="float32")

    def build_model(self):
        return keras.Sequential([keras.Input((3,)), self.head(2)])

    def build_data(self, split, context):
        return {"x": X, "y": Y}

    def loss(self, batch, training):
        logits = self.model(batch["x"], training=training)
        losses = keras.losses.sparse_categorical_crossentropy(
            batch["y"], logits, from_logits=True
        )
        return LossOutput(losses, batch["weight"], (batch["y"], logits))

    def metrics(self):
        return {"accuracy": keras.metrics.SparseCategoricalAccuracy()}

    def predict(self, batch):
        return tf.nn.softmax(self.model(batch["x"], training=False))


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def every(total_steps, epoch, settings):
    values = session.intervals(RunConfig(**settings), total_steps, epoch)
    names = ("steps_per_loop", "log_every_steps", "eval_every_steps",
             "checkpoint_every_steps", "summary_interval")  # fmt: skip
    assert tuple(values) == names
    return list(values.values())


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"train_epochs": 20}, [50, 50, 50, 50, 50]),
        ({}, [50, 50, 50, 50, 50]),
        ({"train_epochs": 20, "eval_every_epochs": 3}, [50, 50, 150, 150, 50]),
        ({"train_epochs": 20, "eval_every_steps": 7}, [7, 7, 7, 7, 7]),
        ({"train_steps": 1000}, [100, 100, 1000, 1000, 100]),
        ({"train_steps": 1000, "eval_every_epochs": 2}, [100] * 5),
        ({"train_steps": 1000, "log_every_steps": 30}, [30, 30, 1000, 1000, 30]),
        ({"train_steps": 999, "checkpoint_every_steps": 9}, [9, 100, 1000, 9, 100]),
        ({"train_steps": 999, "summary_every_steps": 0}, [100, 100, 1000, 1000, 100]),
        ({"train_steps": 1000, "summary_every_steps": 5}, [5, 100, 1000, 1000, 5]),
        ({"train_steps": 1000, "steps_per_loop": 400}, [400, 100, 1000, 1000, 100]),
    ],
)
def test_intervals(settings, expected):
    assert every(1000, 50, settings) == expected


def test_intervals_of_long_runs_and_of_data_without_a_known_end():
    epochs = {"train_epochs": 5}
    assert every(49_995, 9_999, epochs) == [100, 9_999, 9_999, 1000, 9_999]
    steps = {"train_steps": 300}
    assert every(300, None, steps) == [100, 100, 300, 300, 100]
    with pytest.raises(ConfigError, match="`eval_every_epochs` .2. needs training"):
        every(300, None, {"eval_every_epochs": 2, **steps})


def test_the_last_line():
    values = {"accuracy": 0.98765, "loss": 2.0}
    line = "digits: accuracy 0.9877 loss 2.0000"
    assert session.result_line("digits", values) == line
    assert session.result_line("digits", {"step": 7}) == "digits: step 7"


def run(**settings):
    return launch.run(Line, **settings)


def lines():
    with open("runs/line/latest/metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.mark.slow
def test_train_and_evaluate_then_every_other_mode(capsys):
    results = run()
    assert list(results) == ["train", "validation", "test"]
    assert results["test"]["accuracy"] > 0.6
    assert [(line["split"], line["step"]) for line in lines()] == [
        ("train", 3), ("validation", 3), ("train", 6), ("validation", 6),
        ("train", 9), ("validation", 9), ("test", 9),
    ]  # fmt: skip
    out = capsys.readouterr().out.splitlines()
    test = results["test"]
    last = f"line: accuracy {test['accuracy']:.4f} loss {test['loss']:.4f}"
    assert out[-1] == last
    path = workdir.find_run(Config(mode="eval"), "line")
    assert out[-6:-1] == [
        f"Files:    flagfile.txt, metrics.jsonl, checkpoints in {path}",
        f"Resume:   mpl.run(Line, workdir='{path}', train_epochs=6)",
        out[-4],
        f"Evaluate: mpl.run(Line, workdir='{path}', mode='eval')",
        f"Predict:  mpl.run(Line, workdir='{path}', mode='predict')",
    ]

    assert run(mode="eval")["test"] == test
    assert capsys.readouterr().out.splitlines()[-1] == last
    assert run(mode="continuous_eval")["test"] == test

    assert run(mode="predict", global_batch_size=16) == {}
    assert capsys.readouterr().out.splitlines()[-1] == "line: predictions 20"
    with np.load(os.path.join(path, "predictions.npz")) as arrays:
        predictions = arrays["predictions"]
    assert predictions.shape == (20, 2)
    assert np.mean(predictions.argmax(1) == Y) == pytest.approx(test["accuracy"])

    np.savez("input.npz", x=X[:5])
    run(mode="predict", input="input.npz", output="output.npz")
    with np.load("output.npz") as arrays:
        np.testing.assert_allclose(arrays["predictions"], predictions[:5], atol=1e-6)

    run(mode="export", output="model")
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "line: step 9"
    assert "float32 export against float32 training" in out[-2]
    assert float(out[-2].split()[-1]) < 1e-6 and tf.saved_model.contains_saved_model(
        "model"
    )


@pytest.mark.slow
def test_going_on_is_the_same_as_never_stopping():
    run(workdir="whole", train_epochs=4)
    run(workdir="parts", train_epochs=2)
    run(workdir="parts", train_epochs=4)
    with open("parts/metrics.jsonl", encoding="utf-8") as file:
        before = len(file.readlines())
    run(workdir="parts", resume=True)  # complete: evaluates again
    run(workdir="parts", mode="eval")
    logs = []
    for folder in ("whole", "parts"):
        with open(f"{folder}/metrics.jsonl", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        keys = [(r["split"], r["step"]) for r in rows]
        assert len(set(keys)) == len(rows)
        logs.append({(r["split"], r["step"]): (r["loss"], r["accuracy"]) for r in rows})
    assert logs[0].items() <= logs[1].items() and len(rows) == before
    assert workdir.read_flagfile("parts")["train_epochs"] == "4"


def test_all_at_once(capsys):
    run(mode="all", train_epochs=1)
    out = capsys.readouterr().out
    assert "Exported to" in out and "Predictions for 20 examples" in out
    assert sorted(os.listdir("runs/line/latest")) == [
        "checkpoints", "export", "flagfile.txt", "goodput.json", "lock",
        "metrics.jsonl", "predictions.npz",
    ]  # fmt: skip


def test_training_alone_evaluates_nothing(capsys):
    results = run(mode="train", train_steps=4, log_every_steps=2)
    assert list(results) == ["train"]
    assert [line["step"] for line in lines()] == [2, 4]
    assert capsys.readouterr().out.splitlines()[-1].startswith("line: accuracy ")


class Worse(Line):
    """Gets worse: its learning rate is far too high, and its data mislead."""

    def build_data(self, split, context):
        return {"x": X, "y": Y if split != "train" else 1 - Y}


@pytest.mark.slow
def test_early_stopping_ends_at_the_best_checkpoint(capsys):
    settings = {"train_epochs": 50, "early_stop": "loss:2", "workdir": "w"}
    results = launch.run(Worse, **settings)
    out = capsys.readouterr().out
    # The first evaluation is the best one, two worse ones follow.
    assert "Early stopping looks for the minimum of validation loss" in out
    assert "Best by validation: step 3, used from here on" in out
    assert "early_stop=None" in out
    assert results["test"]["loss"] < results["validation"]["loss"]
    assert sorted(os.listdir("w/checkpoints/best/loss"))[-1].startswith("ckpt-3.")
    assert launch.run(Worse, workdir="w", mode="eval")["test"] == results["test"]
    # A run that has stopped stays so, until it watches something else.
    launch.run(Worse, workdir="w")
    assert "Best by validation: step 3" in capsys.readouterr().out
    launch.run(Worse, workdir="w", early_stop="accuracy:1")
    out = capsys.readouterr().out
    assert "Changed since the run began: early_stop loss:2 -> accuracy:1" in out
    assert "Best by validation: step 12" in out


def test_ctrl_c_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(self, steps):
        self.save_checkpoint()
        raise KeyboardInterrupt

    monkeypatch.setattr(session.loop.Controller, "train_and_evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(workdir="w")
    assert capsys.readouterr().err.splitlines() == [
        "Stopped at step 0; last checkpoint: w/checkpoints/ckpt-0",
        "Go on with: mpl.run(Line, workdir='w')",
    ]
    with pytest.raises(KeyboardInterrupt):
        run(workdir="w", mode="all")
    hint = "Go on with: mpl.run(Line, workdir='w', mode='all')"
    assert capsys.readouterr().err.splitlines()[-1] == hint


def test_a_run_without_a_checkpoint_cannot_be_evaluated():
    workdir.write_flagfile(workdir.create("w", "line"), Config())
    with pytest.raises(CheckpointError, match="holds no checkpoint yet"):
        run(workdir="w", mode="eval")


class Wide(Line):
    """Has another layer; still named line."""

    name = "line"

    def build_model(self):
        return keras.Sequential([keras.Input((3,)), self.head(4)])


def test_a_refused_resume_leaves_the_flagfile_alone():
    run(workdir="w", mode="train", train_steps=1, policy="auto")
    with open("w/flagfile.txt", encoding="utf-8") as file:
        before = file.read()
    assert before.startswith("# experiment: line\n# training examples: 20\n")
    assert workdir.read_flagfile("w")["policy"] != "auto"
    with pytest.raises(CheckpointError, match="is of another model"):
        launch.run(Wide, workdir="w", seed=1, allow_changed_flags=True)
    with open("w/flagfile.txt", encoding="utf-8") as file:
        assert file.read() == before


class Words(Line):
    """Reads strings."""

    def build_data(self, split, context):
        return {"x": np.array(["a", "bcd"] * 10), "y": Y}

    def lengths(self, batch):
        length = tf.strings.length(batch["x"])[:, None]
        return {"x": tf.repeat(tf.cast(length, tf.float32), 3, axis=1)}

    def loss(self, batch, training):
        return super().loss({**batch, **self.lengths(batch)}, training)

    def predict(self, batch):
        return super().predict(self.lengths(batch))


@pytest.mark.slow
def test_strings_are_features_in_every_mode(capsys):
    launch.run(Words, mode="all", train_steps=2)
    np.savez("input.npz", x=np.array(["abc", "e"]))
    launch.run(Words, mode="predict", input="input.npz")
    out = capsys.readouterr().out
    assert "Exported to" in out and "Predictions for 2 examples" in out


def test_input_that_is_no_npz_file():
    run(mode="train", train_steps=1)
    with open("input.npz", "w", encoding="utf-8") as file:
        file.write("text")
    faults = {"input.npz": "must be an .npz file", "none.npz": "does not exist"}
    for path, fault in faults.items():
        with pytest.raises(ConfigError, match=f"`input` .* {fault}"):
            run(mode="predict", input=path)


def test_commands_of_a_program_are_shell_words():
    line = Line()
    line.config = Config()
    one = Guide(line, "my runs/1", "python -m line")
    assert one.command(mode="eval", early_stop=None) == (
        "python -m line '--workdir=my runs/1' --mode=eval --early_stop=none"
    )


def test_the_same_again_keeps_what_the_command_alone_says():
    line = Line()
    line.config = Config(mode="predict", input="x.npz", output="my y.npz")
    assert Guide(line, "runs/1", "python -m line").again() == (
        "python -m line --workdir=runs/1 --mode=predict --input=x.npz "
        "'--output=my y.npz'")
