"""The GAN's methods are no hooks: TensorBoard's summaries are written."""

import glob

import pytest

import mpl
from experiments.gan_digits import GanDigits


@pytest.mark.slow
def test_an_evaluation_with_summaries(tmp_path):
    pytest.importorskip("tensorboard")
    results = mpl.run(GanDigits, workdir=str(tmp_path), train_steps=2, policy="float32")
    assert 0 < results["test"]["mae"] < 1
    assert glob.glob(f"{tmp_path}/summaries/validation/*tfevents*")
