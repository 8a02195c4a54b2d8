"""The convolutional network learns, on MNIST's files and on digits."""

import numpy as np
import pytest

import mpl
from experiments.datasets import digits
from experiments.mnist_cnn import Config, MnistCnn
from test_mnist_data import examples, write_idx
from whole_runs import POLICIES, predictions, resumed, run, two_steps


@pytest.fixture
def folder(tmp_path):
    return str(write_idx(tmp_path / "mnist"))


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
def test_two_steps(policy, replicas, folder, strategy_of):
    experiment = two_steps(
        MnistCnn, strategy_of(replicas), policy=policy, data_dir=folder,
        global_batch_size=16)
    assert experiment.num_examples == {"train": 33, "validation": 3, "test": 10}
    # 3·3·32 + 32, 9·32·64 + 64, 9·64·64 + 64, 576·64 + 64, 64·10 + 10
    assert experiment.model.count_params() == 320 + 18496 + 36928 + 36928 + 650


def test_the_loss_by_numpy(folder, strategy_of):
    experiment = MnistCnn()
    experiment.setup(
        Config(policy="float32", data_dir=folder, global_batch_size=4), strategy_of(1))
    image, label = examples("test")
    batch = {"image": image[..., np.newaxis], "label": label,
             "weight": np.ones(10, np.float32)}
    output = experiment.loss(batch, training=False)
    logits = output.outputs[1].numpy().astype(np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(
        output.per_example, -np.log(shares[np.arange(10), label]), rtol=1e-5)
    np.testing.assert_allclose(experiment.predict(batch), shares, atol=1e-6)
    want = np.mean(logits.argmax(1) == label)
    got = float(experiment.evaluators["test"].evaluate()["accuracy"])
    assert got == pytest.approx(want)
    # Pixels go in from 0 to 1.
    np.testing.assert_allclose(
        experiment.model.layers[0](batch["image"])[..., 0], image / 255, rtol=1e-6)


@pytest.mark.slow
def test_resume_export_predict(folder, tmp_path):
    _, got = resumed(MnistCnn, tmp_path, policy="mixed_bfloat16", data_dir=folder,
                     global_batch_size=16, atol=0.02)
    assert got.shape == (10, 10)
    np.testing.assert_allclose(got.sum(1), 1, rtol=1e-5)
    run(MnistCnn, tmp_path / "parts", mode="predict",
        input=f"{folder}/t10k-images-idx3-ubyte")
    np.testing.assert_allclose(predictions(tmp_path / "parts"), got, atol=1e-6)


def test_a_file_to_predict_is_read_whole(folder):
    experiment = MnistCnn()
    experiment.config = Config(global_batch_size=4)
    part, = experiment.read_input(f"{folder}/t10k-images-idx3-ubyte")
    np.testing.assert_array_equal(part["image"][..., 0], examples("test")[0])


@pytest.mark.slow
def test_it_learns_digits(tmp_path):
    results = run(MnistCnn, tmp_path, train_epochs=8, policy="float32", mode="all")
    assert results["test"]["accuracy"] > 0.93  # three seeds: 0.967 to 0.969
    label = digits.load("test")["label"]
    got = np.mean(predictions(tmp_path).argmax(1) == label)
    assert got == pytest.approx(results["test"]["accuracy"])


def test_a_damaged_file_ends_the_run_before_it_starts(folder, tmp_path):
    with open(f"{folder}/t10k-labels-idx1-ubyte", "ab") as file:
        file.write(b"?")
    with pytest.raises(mpl.ConfigError, match="^Split test: .*t10k-labels-idx1-ubyte"):
        run(MnistCnn, tmp_path / "run", data_dir=folder)
    assert not (tmp_path / "run").exists()
