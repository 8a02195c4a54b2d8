"""The table by epochs says what the experiment itself says of the same training."""

import json

import numpy as np
import pytest

import mpl
from experiments.benchmarks import epochs
from experiments.datasets import mnist
from experiments.mnist_mlp import MnistMlp


@pytest.mark.slow
def test_the_table_of_a_training(tmp_path, capsys):
    out = tmp_path / "out"
    assert epochs.main([f"--out={out}", "--train_epochs=2", "--hidden=32",
                        "--policies=float32,mixed_bfloat16"]) == 0
    content = json.loads((out / "epochs.json").read_text())
    rows = content["policies"]
    assert list(rows) == ["float32", "mixed_bfloat16"]
    assert content["title"] == ("784-32-10 on the embedded digits, enlarged: 1,257 "
                                "training and 360 test images")
    assert [row["epoch"] for row in rows["float32"]] == [1, 2]
    assert (out / "epochs.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "epochs.md").read_text()
    assert text in capsys.readouterr().out
    last = [rows[policy][1][name] for policy in rows for name in epochs.FIGURES]
    cells = [f"{value:.4f}" for value in last]
    assert text.splitlines()[-1] == f"| 2 | {' | '.join(cells)} |"
    assert text.splitlines()[2].count("|") == 10

    run = tmp_path / "run"
    results = mpl.run(MnistMlp, workdir=str(run), policy="float32", train_epochs=2,
                      hidden=32, summary_every_steps=0)
    want = rows["float32"][-1]
    for name in ("loss", "accuracy"):
        assert results["test"][name] == pytest.approx(want[f"test {name}"], rel=1e-6)
    # Of the training images by NumPy, with the run's weights.
    images = mnist.load("train", None)
    shares = mpl.load_predictor(run, MnistMlp)(images)
    of_label = shares[np.arange(len(shares)), images["label"]]
    assert want["train loss"] == pytest.approx(-np.log(of_label).mean(), rel=1e-4)
    right = np.mean(shares.argmax(1) == images["label"])
    assert want["train accuracy"] == pytest.approx(right)
    for policy in rows:
        assert rows[policy][1]["train loss"] < rows[policy][0]["train loss"]


def test_wrong_settings_are_found_before_anything_is_trained(tmp_path, capsys):
    assert epochs.main([f"--out={tmp_path}", "--policies=float32,float8"]) == 1
    assert "`policy` (float8)" in capsys.readouterr().err
    assert epochs.main([f"--out={tmp_path}", "--hidden=wide"]) == 1
    assert "`hidden` (wide)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
