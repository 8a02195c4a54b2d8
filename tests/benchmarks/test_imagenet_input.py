"""The benchmark of ImageNet's input: what it writes, counts and concludes."""

import json

import numpy as np
import pytest
import tensorflow as tf

from experiments.benchmarks import imagenet_input
from experiments.datasets import imagenet, tfrecords

RATES = {"training": 200.0, "input": 80.0, "both": 75.0}


def test_it_writes_records_of_imagenets_form_and_size(tmp_path):
    size = imagenet_input.write_records(tmp_path, files=2, per_file=8)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["train-00000-of-00002", "train-00001-of-00002",
                     "validation-00000-of-00001"]
    assert size == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert 90e3 < size / 24 < 140e3
    assert [tfrecords.count(str(tmp_path / name)) for name in names] == [8] * 3
    shapes = set()
    for record in imagenet.records(str(tmp_path / names[0])):
        shapes.add(tuple(tf.io.decode_jpeg(record["encoded"]).shape))
        assert 0 <= record["label"] < 1000
    assert shapes == {(375, 500, 3), (500, 375, 3), (333, 500, 3), (480, 640, 3)}


def test_a_rate_leaves_out_the_first_calls():
    now, calls = [0.0], []

    def call():
        calls.append(now[0])
        now[0] += 50.0 if len(calls) <= 2 else 2.0

    assert imagenet_input.rate(call, 8, 5.0, clock=lambda: now[0]) == 8 * 3 / 6.0
    assert len(calls) == 5


def test_a_verdict():
    assert imagenet_input.verdict(RATES, 4) == (
        "Training waits for input 62 % of the time (input alone: 80 images/s, 20 on "
        "each of 4 cores); it takes some 10 cores to feed it.")
    assert imagenet_input.verdict({**RATES, "both": 191.0}, 4).startswith(
        "Input does not hold training up (input alone: 80 images/s")


@pytest.mark.slow
def test_it_measures_and_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(imagenet_input, "FILES", 2)
    monkeypatch.setattr(imagenet_input, "PER_FILE", 4)
    assert imagenet_input.main([
        f"--out={tmp_path}", "--depth=14", "--width=4", "--image_size=32",
        "--batch_size=4", "--secs=0.2", "--policy=float32"]) == 0
    said = capsys.readouterr().out
    assert "synthetic: 12 records in ImageNet's form" in said
    assert "| | images per second |" in said
    assert "Input does not hold" in said or "Training waits" in said
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["images_per_sec"]) == {"training", "input", "both"}
    assert all(np.isfinite(x) and x > 0 for x in results["images_per_sec"].values())
    assert results["batch_size"] == 4


def test_it_says_what_is_missing(tmp_path, capsys):
    assert imagenet_input.main([
        f"--out={tmp_path}", f"--data_dir={tmp_path}", "--depth=14", "--width=4",
        "--image_size=32", "--secs=0.1", "--policy=float32"]) == 1
    assert "holds no train-" in capsys.readouterr().err


@pytest.mark.parametrize("wrong, message", [
    ("--image_size=8", "`image_size` (8) must be an integer at least 32"),
    ("--batch_size=0", "`global_batch_size` (0) must be an integer at least 1")])
def test_wrong_settings_are_found_before_anything_is_written(
    wrong, message, tmp_path, capsys
):
    assert imagenet_input.main([f"--out={tmp_path}", wrong]) == 1
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())
    with pytest.raises(SystemExit) as end:
        imagenet_input.main([wrong])
    assert end.value.code == 2 and "--out" in capsys.readouterr().err
