"""What docs/file_formats.md says of files is what a run writes."""

import json
import os
import re
import zlib

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


@pytest.fixture
def run(first_run, monkeypatch):
    """The folder of a run, which lies at the page's place."""
    folder, _ = first_run
    monkeypatch.chdir(folder)
    return folder / "runs" / "digits" / "latest"


def lines_of(run):
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_what_is_read():
    (row,) = re.findall(r"^\| `digits`, .*$", pages.text_of(PAGE), re.M)
    path, image, label = re.findall(r"`([^`]*/[^`]*|image|label)`", row)
    with np.load(pages.ROOT / path) as arrays:
        assert sorted(arrays) == [image, label]
        assert (arrays[image].dtype, arrays[image].shape) == (np.uint8, (1797, 8, 8, 1))
        assert (arrays[image].min(), arrays[image].max()) == (0, 16)
        assert (arrays[label].dtype, arrays[label].shape) == (np.uint8, (1797,))
        assert set(arrays[label]) == set(range(10))


@pytest.mark.slow
def test_the_working_folder(run):
    names = pages.row_names(PAGE, "| file | format | written |")
    first = {name.rstrip("/").split("/")[0] for name in names}
    assert first - set(os.listdir(run)) == {"profile", "jit_compile.json"}
    assert set(os.listdir(run)) <= first
    assert sorted(os.listdir(run / "summaries")) == ["test", "train", "validation"]
    assert (run / "lock").read_text().isdecimal()


@pytest.mark.slow
def test_the_flagfile(run):
    lines = (run / "flagfile.txt").read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ["# experiment: digits", "# training examples: 1257"]
    assert f"`{lines[0]}`" in pages.text_of(PAGE)
    assert f"`{lines[1]}`" in pages.text_of(PAGE)
    flags = dict(line.split("=", 1) for line in lines[2:])
    assert (flags["--train_steps"], flags["--seed"]) == ("none", "0")
    assert flags["--policy"] != "auto" and "--workdir" not in flags
    assert {f"--{name}" for name in PER_COMMAND}.isdisjoint(flags)


@pytest.mark.slow
def test_the_fields_of_metrics(run, tmp_path):
    table = re.findall(r"^\| (.*?) \| (.*?) \|.*\|$", pages.text_of(PAGE).partition(
        "| field | in lines of | |\n|---|---|---|\n")[2].partition("\n\n")[0], re.M)
    MetricsWriter(tmp_path / "metrics.jsonl", global_batch_size=1).note(3, "text")
    note = json.loads((tmp_path / "metrics.jsonl").read_text())
    kinds = {line["split"]: line for line in [*lines_of(run), note]}
    assert list(kinds) == ["train", "validation", "test", "note"]
    for split, line in kinds.items():
        named = {"accuracy"} if split != "note" else set()
        for names, where in table:
            if where == "all" or f"`{split}`" in where or (
                    where == "all but `note`" and split != "note"):
                named |= set(re.findall(r"`(\w+)`", names))
        assert set(line) == named, split


@pytest.mark.slow
def test_the_reader_of_metrics(run):
    names = pages.names_of(PAGE, 0)
    train = [line for line in lines_of(run) if line["split"] == "train"]
    assert names["steps"] == [line["step"] for line in train] == [20, 40]
    assert names["loss"] == [line["loss"] for line in train]
    steps, epochs = names["curve"](run, "validation", "epoch")
    assert (steps, epochs) == ([20, 40], [1, 2])


def test_a_line_that_is_being_written_is_passed_over(tmp_path, first_run, monkeypatch):
    monkeypatch.chdir(first_run[0])
    curve = pages.names_of(PAGE, 0)["curve"]
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "split": "train", "loss": null}\n'
        '{"step": 2, "split": "train", "loss": 0.5}\n{"step": 3, "spl')
    assert curve(tmp_path, "train", "loss") == ([2], [0.5])


@pytest.mark.slow
def test_goodput(run):
    state = json.loads((run / "goodput.json").read_text())
    table = pages.text_of(PAGE).partition("## goodput.json")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.M)
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == set(state)
    value = ((state["step"] - state["first_step"]) / state["blocks_steps"]
             * state["blocks_secs"] / state["wall_secs"])
    last = [line for line in lines_of(run) if line["split"] == "train"][-1]
    assert value == pytest.approx(last["goodput"], abs=0.05)
    assert state["ended"] is True and state["lost_steps"] == state["restarts"] == 0


@pytest.mark.slow
def test_checkpoints(run, tmp_path):
    text = pages.text_of(PAGE).partition("## Checkpoints")[2].partition("\n## ")[0]
    top, fields = (set(re.findall(r"`(\w+)`", " ".join(re.findall(
        r"^\| (`.*?) \|", table, re.M)))) for table in text.split("ckpt-<step>.commit"))
    path = run / "checkpoints" / "ckpt-40"
    marker = json.loads((run / "checkpoints" / "ckpt-40.commit").read_text())
    assert set(marker) == fields and marker["step"] == 40
    assert sorted(marker["files"]) == ["ckpt-40.data-00000-of-00001", "ckpt-40.index"]
    assert sorted(marker["versions"]) == ["keras", "numpy", "tensorflow"]
    assert marker["flags"]["train_epochs"] == 2
    stored = tf.train.load_checkpoint(str(path)).get_variable_to_shape_map()
    assert {name.split("/")[0] for name in stored} - {"_CHECKPOINTABLE_OBJECT_GRAPH"} == (
        top)
    (best,) = os.listdir(run / "checkpoints" / "best")
    assert best == "accuracy"
    names = {"json": json}
    exec(pages.blocks(PAGE, "python")[1], names)
    assert names["is_whole"](path) and not names["is_whole"](tmp_path / "ckpt-1")
    for name in (*marker["files"], "ckpt-40.commit"):
        content = (run / "checkpoints" / name).read_bytes()
        (tmp_path / name).write_bytes(content)
    assert names["is_whole"](tmp_path / "ckpt-40")
    damaged = bytearray(content := (tmp_path / "ckpt-40.index").read_bytes())
    damaged[5] ^= 1
    assert zlib.crc32(damaged) != zlib.crc32(content)
    (tmp_path / "ckpt-40.index").write_bytes(damaged)
    assert not names["is_whole"](tmp_path / "ckpt-40")


def test_a_run_takes_up_the_trial_of_the_page(tmp_path, monkeypatch):
    (text,) = pages.blocks(PAGE, "json")
    ((key, choice),) = json.loads(text).items()
    said, make = [], jit_trial._key
    keys = []

    def key_of(experiment):
        keys.append(make(experiment))
        return key

    monkeypatch.setattr(jit_trial, "_key", key_of)
    monkeypatch.setattr(
        jit_trial.logging, "info", lambda *words: said.append(words[0] % words[1:]))
    (tmp_path / jit_trial.FILE).write_text(text)
    mpl.run(Digits, train_steps=1, train_epochs=None, mode="train", policy="float32",
            workdir=str(tmp_path), summary_every_steps=0)
    assert f"jit_compile auto: compiled, as measured before: {choice['why']}" in said
    shape = [re.sub(r"[\d.]+|[0-9a-f]{16}", "#", part) for part in key.split("; ")[1:]]
    assert [re.sub(r"[0-9a-f]{16}|[\d.]+", "#", part)
            for part in keys[0].split("; ")[1:]] == shape


@pytest.mark.slow
def test_export_and_predictions(run):
    text = pages.text_of(PAGE).partition("## export/")[2].partition("\n## ")[0]
    fields = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", text, re.M))))
    info = json.loads((run / "export" / "mpl_export.json").read_text())
    assert set(info) == fields
    assert (info["run"], info["experiment"], info["step"]) == ("digits", "digits", 40)
    named = re.findall(r"`([\w.]+)/?`", text.partition("whose")[0])
    assert sorted(os.listdir(run / "export")) == sorted([*named, "mpl_export.json"])
    names = pages.names_of(PAGE, 2)
    assert names["classes"].shape == (360,)


def test_no_metric_takes_the_name_of_a_field():
    table = pages.text_of(PAGE).partition("| field | in lines of | |\n|---|---|---|\n")[2]
    rows = table.partition("\n\n")[0].splitlines()
    names = re.findall(r"`(\w+)`", " ".join(row.split("|")[1] for row in rows))
    assert len(names) == 16
    for name in names:
        with pytest.raises(mpl.ConfigError, match=f"names a metric '{name}'"):
            Metrics({name: None})
