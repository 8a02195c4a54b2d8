"""What docs/arrays.md gives to paste, and says of arrays."""

import re

import keras
import numpy as np
import pages
import pytest
import tensorflow as tf

import mpl

PAGE = "arrays.md"


@pytest.fixture(scope="module")
def page():
    return pages.names_of(PAGE, 0, 1, 2)


def run(experiment, tmp_path, **settings):
    return mpl.run(experiment, workdir=str(tmp_path / "run"), mode="train",
                   summary_every_steps=0, **{"policy": "float32", **settings})


@pytest.mark.slow
def test_the_program_learns_and_its_run_predicts(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (call,) = re.findall(r"results = (mpl\.run\(.*\))", pages.text_of(PAGE))
    results = eval(call, page)
    assert results["test"]["accuracy"] > 0.95
    exec(pages.blocks(PAGE, "python")[3], page)
    assert page["probabilities"].shape == (2, 2)
    assert page["probabilities"].argmax(-1).tolist() == [1, 0]


def test_the_parts_share_no_example(page):
    parts = page["PARTS"]
    assert [len(part) for part in parts.values()] == [1600, 200, 200]
    assert sorted(np.concatenate(list(parts.values()))) == list(range(2000))


def test_weights_balance_the_classes(page):
    arrays = page["Balanced"]().build_data("train", None)
    sums = np.bincount(arrays["label"], arrays["weight"])
    np.testing.assert_allclose(sums, [800, 800], rtol=1e-5)
    assert arrays["weight"].dtype == np.float32
    assert "weight" not in page["Balanced"]().build_data("validation", None)


def test_augmentation_follows_its_seed(page, tmp_path):
    batch = {"point": tf.zeros([1000, 2]), "label": tf.zeros([1000], tf.int32)}
    first, again, other = (
        page["noisy"](batch, seed)["point"].numpy()
        for seed in ([1, 2], [1, 2], [1, 3]))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).min() > 0
    assert abs(first.std() - 0.1) < 0.01
    assert run(page["Noisy"], tmp_path, train_steps=2)["train"]["loss"] > 0


def test_what_the_table_of_dtypes_says(page, tmp_path):
    whole = tf.range(258)
    exact = tf.cast(tf.cast(whole, tf.bfloat16), tf.int32) == whole
    assert exact.numpy().tolist() == [True] * 257 + [False]
    assert (np.zeros([5]) - np.zeros([5, 1])).shape == (5, 5)

    class Wide(page["Ring"]):

        def build_data(self, split, context):
            arrays = super().build_data(split, context)
            return {**arrays, "point": arrays["point"].astype(np.float64)}

    results = run(Wide, tmp_path, train_steps=2, policy="mixed_bfloat16")
    assert results["train"]["loss"] > 0

    class Narrow(page["Ring"]):

        def build_model(self):
            return keras.Sequential([keras.Input([2]), keras.layers.Dense(2)])

    with pytest.raises(mpl.ConfigError, match="bfloat16"):
        run(Narrow, tmp_path / "narrow", train_steps=2, policy="mixed_bfloat16")


def test_a_split_that_there_is_not(page, tmp_path):

    class Alone(page["Ring"]):

        def build_data(self, split, context):
            return super().build_data(split, context) if split == "train" else None

    results = run(Alone, tmp_path, train_steps=2)
    assert list(results) == ["train"]
