"""The embedded digits are the published ones, split without overlap."""

import hashlib

import numpy as np
import pytest

import mpl
from experiments.benchmarks import binaries
from experiments.datasets import digits


def test_the_embedded_file_is_the_published_set():
    with np.load(digits._FILE) as file:
        image, label = file["image"], file["label"]
    assert image.shape == (1797, 8, 8, 1)
    assert digits._FILE.stat().st_size <= 60_000
    assert hashlib.sha256(image.tobytes() + label.tobytes()).hexdigest() == (
        "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"
    )


@pytest.mark.parametrize(
    ("split", "size"), [("train", 1257), ("validation", 180), ("test", 360)]
)
def test_load(split, size):
    data = digits.load(split)
    assert data["image"].shape == (size, 8, 8, 1)
    assert data["image"].dtype == np.uint8
    assert data["image"].max() == 16
    assert data["label"].shape == (size,)
    assert data["label"].dtype == np.int32
    assert set(data["label"]) == set(range(digits.NUM_CLASSES))


def test_the_splits_are_fixed_and_share_no_image():
    order = np.random.RandomState(0).permutation(1797)
    with np.load(digits._FILE) as file:
        image, label = file["image"], file["label"]
    parts = [digits.load(split) for split in ("train", "validation", "test")]
    together = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    np.testing.assert_array_equal(together["image"], image[order])
    np.testing.assert_array_equal(together["label"], label[order])
    # Numbers that no other NumPy may change.
    assert order[:5].tolist() == [1081, 1707, 927, 713, 262]
    assert sorted(order) == list(range(1797))


def test_an_unknown_split_is_an_error():
    with pytest.raises(mpl.ConfigError, match=r"`split` \(valid\).*\nUse one of"):
        digits.load("valid")


def test_other_data_are_not_ignored():
    for split in digits.SPLITS:
        with pytest.raises(mpl.ConfigError) as error:
            digits.load(split, "mnist")
        assert str(error.value) == (
            "`data_dir` (mnist) is not read: these digits are embedded.\n"
            "Leave --data_dir out.")


@pytest.mark.parametrize("name", [
    "digits", "distill", "gan_digits", "linear", "penalty", "sam"])
def test_no_binary_with_data_of_its_own_takes_a_folder(name, tmp_path, strategy_of):
    kind, settings = binaries.launched(name)
    experiment, config = kind(), kind.Config or mpl.RunConfig
    with pytest.raises(mpl.ConfigError, match="Split train: `data_dir` .* is not read"):
        experiment.setup(config(data_dir=str(tmp_path), **settings), strategy_of(1))


def test_training_images_are_announced_once(capsys):
    for split in digits.SPLITS:
        digits.load(split)
    assert capsys.readouterr().out == (
        "Data: 1,257 embedded digits of 8×8, from the UCI set\n")
    for split in digits.SPLITS:
        digits.load_enlarged(split, factor=3, border=2)
    assert capsys.readouterr().out == (
        "Data: 1,257 embedded digits of 8×8, enlarged to 28×28, for want of "
        "--data_dir\n")
