"""What docs/file_formats.md says of files is what a run writes."""

import json
import os
import re

import numpy as np
import pages
import pytest
import tensorflow as tf

import mpl
from experiments.digits import Digits
from mpl.launch import jit_trial
from mpl.launch.workdir import PER_COMMAND
from mpl.record.metrics_log import MetricsWriter
from mpl.step.metrics import Metrics

PAGE = "file_formats.md"
GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"  # TensorFlow's own


@pytest.fixture
def run(first_run, monkeypatch):
    """The folder of a run, at the place where the page has one."""
    folder, _ = first_run
    monkeypatch.chdir(folder)
    return folder / "runs" / "digits" / "latest"


def lines_of(run):
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def fields(title):
    return set(pages.row_names(pages.section(PAGE, title), "| field | |"))


def test_what_is_read():
    (row,) = re.findall(r"^\| `digits`, .*$", pages.text_of(PAGE), re.M)
    path, image, label = re.findall(r"`(experiments/.*?|image|label)`", row)
    with np.load(pages.ROOT / path) as arrays:
        assert sorted(arrays) == [image, label]
        assert (arrays[image].dtype, arrays[image].shape) == (np.uint8, (1797, 8, 8, 1))
        assert (arrays[image].min(), arrays[image].max()) == (0, 16)
        assert (arrays[label].dtype, arrays[label].shape) == (np.uint8, (1797,))
        assert set(arrays[label]) == set(range(10))


@pytest.mark.slow
def test_the_working_folder(run):
    names = pages.row_names(pages.text_of(PAGE), "| file | format | written |")
    named = {name.split("/")[0] for name in names}
    there = set(os.listdir(run))
    assert named - there == {"profile", "jit_compile.json"} and there <= named
    assert sorted(os.listdir(run / "summaries")) == ["test", "train", "validation"]
    assert os.listdir(run / "checkpoints" / "best") == ["accuracy"]
    assert (run / "lock").read_text().isdecimal()


@pytest.mark.slow
def test_the_flagfile(run):
    lines = (run / "flagfile.txt").read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ["# experiment: digits", "# training examples: 1257"]
    assert all(f"`{line}`" in pages.section(PAGE, "flagfile.txt") for line in lines[:2])
    flags = dict(line.split("=", 1) for line in lines[2:])
    assert (flags["--train_steps"], flags["--async_checkpoints"]) == ("none", "true")
    assert flags["--policy"] != "auto" and "--workdir" not in flags
    assert {f"--{name}" for name in PER_COMMAND}.isdisjoint(flags)


@pytest.mark.slow
def test_the_fields_of_metrics(run, tmp_path):
    MetricsWriter(tmp_path / "metrics.jsonl", global_batch_size=1).note(3, "text")
    lines = [*lines_of(run), *lines_of(tmp_path)]
    rows = re.findall(r"^\| (.*?) \| (all|all but `note`|`train`|`note`) \| .*\|$",
                      pages.section(PAGE, "metrics.jsonl"), re.M)
    assert len(rows) == 14
    for line in lines:
        split = line["split"]
        named = {"accuracy"} if split != "note" else set()
        for names, where in rows:
            if where == "all" or where == f"`{split}`" or (
                    where == "all but `note`" and split != "note"):
                named |= set(re.findall(r"`(\w+)`", names)) - {"accuracy"}
        assert set(line) == named, split
    assert {line["split"] for line in lines} == {"train", "validation", "test", "note"}


@pytest.mark.slow
def test_the_reader_of_metrics(run):
    names = pages.names_of(PAGE, 0)
    train = [line for line in lines_of(run) if line["split"] == "train"]
    assert names["steps"] == [line["step"] for line in train] == [20, 40]
    assert names["loss"] == [line["loss"] for line in train]
    assert names["curve"](run, "validation", "epoch") == ([20, 40], [1, 2])


def test_a_line_that_is_being_written_is_passed_over(tmp_path):
    code = pages.blocks(PAGE, "python")[0].partition("\n\n\nsteps, loss")[0]
    names = {}
    exec(code, names)
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "split": "train", "loss": null}\n'
        '{"step": 2, "split": "train", "loss": 0.5}\n{"step": 3, "spl')
    assert names["curve"](tmp_path, "train", "loss") == ([2], [0.5])


def test_no_metric_takes_the_name_of_a_field():
    names = pages.row_names(pages.text_of(PAGE), "| field | in lines of | |")
    assert len(names) == 16
    for name in names:
        with pytest.raises(mpl.ConfigError, match=f"names a metric '{name}'"):
            Metrics({name: None})


@pytest.mark.slow
def test_goodput(run):
    state = json.loads((run / "goodput.json").read_text())
    assert set(state) == fields("goodput.json")
    value = ((state["step"] - state["first_step"]) / state["blocks_steps"]
             * state["blocks_secs"] / state["wall_secs"])
    last = [line for line in lines_of(run) if line["split"] == "train"][-1]
    assert 0 < value <= last["goodput"] < 1  # what came after the line is in the file
    assert state["step"] == 40 and state["ended"] is True
    assert state["lost_steps"] == state["restarts"] == 0


@pytest.mark.slow
def test_checkpoints(run, tmp_path):
    folder = run / "checkpoints"
    marker = json.loads((folder / "ckpt-40.commit").read_text())
    assert set(marker) == fields("Checkpoints") and marker["step"] == 40
    assert sorted(marker["files"]) == ["ckpt-40.data-00000-of-00001", "ckpt-40.index"]
    assert sorted(marker["versions"]) == ["keras", "numpy", "tensorflow"]
    assert marker["flags"]["train_epochs"] == 2
    stored = tf.train.load_checkpoint(str(folder / "ckpt-40"))
    top = {name.split("/")[0] for name in stored.get_variable_to_shape_map()} - {GRAPH}
    told = pages.row_names(pages.section(PAGE, "Checkpoints"), "| name | |")
    assert top == {name for name in told}
    names = {"json": json}
    exec(pages.blocks(PAGE, "python")[1], names)
    is_whole = names["is_whole"]
    assert is_whole(folder / "ckpt-40") and not is_whole(tmp_path / "ckpt-40")
    for name in (*marker["files"], "ckpt-40.commit"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert is_whole(tmp_path / "ckpt-40")
    damaged = bytearray((tmp_path / "ckpt-40.index").read_bytes())
    damaged[5] ^= 1
    (tmp_path / "ckpt-40.index").write_bytes(damaged)
    assert not is_whole(tmp_path / "ckpt-40")
    os.remove(tmp_path / "ckpt-40.index")
    assert not is_whole(tmp_path / "ckpt-40")


def without_numbers(key):
    """Returns the parts of a key but for its device, numbers as #."""
    return re.sub(r"[0-9a-f]{16}|[\d.]+", "#", key).split("; ")[1:]


def test_a_run_takes_up_the_trial_of_the_page(tmp_path, monkeypatch):
    (text,) = pages.blocks(PAGE, "json")
    ((key, choice),) = json.loads(text).items()
    said, keys, key_of = [], [], jit_trial._key

    def key_of_the_page(experiment):
        keys.append(key_of(experiment))
        return key

    monkeypatch.setattr(jit_trial, "_key", key_of_the_page)
    monkeypatch.setattr(
        jit_trial.logging, "info", lambda *words: said.append(words[0] % words[1:]))
    (tmp_path / jit_trial.FILE).write_text(text)
    mpl.run(Digits, train_steps=1, train_epochs=None, mode="train", policy="float32",
            workdir=str(tmp_path), summary_every_steps=0)
    assert f"jit_compile auto: compiled, as measured before: {choice['why']}" in said
    assert without_numbers(keys[0]) == without_numbers(key)


@pytest.mark.slow
def test_export_and_predictions(run):
    info = json.loads((run / "export" / "mpl_export.json").read_text())
    assert set(info) == fields("export/")
    assert (info["run"], info["experiment"], info["step"]) == ("digits", "digits", 40)
    listed = pages.section(PAGE, "export/").partition("whose")[0]
    named = re.findall(r"`([\w.]+)/?`", listed)
    assert sorted(os.listdir(run / "export")) == sorted([*named, "mpl_export.json"])
    assert pages.names_of(PAGE, 2)["classes"].shape == (360,)
