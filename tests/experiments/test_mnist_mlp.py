"""Dense layers of any number and size, which learn in bfloat16."""

import numpy as np
import pytest

import mpl
from experiments.mnist_mlp import Config, MnistMlp
from test_mnist_data import examples, write_npz
from whole_runs import POLICIES, resumed, run, two_steps


@pytest.fixture
def folder(tmp_path):
    return str(write_npz(tmp_path / "mnist"))


@pytest.mark.parametrize("settings, units", [
    ({}, [128]), ({"hidden": 512}, [512]), ({"layers": 3}, [128] * 3),
    ({"hidden": "128,512,1024"}, [128, 512, 1024]),
    ({"hidden": "128,512,1024", "layers": 3}, [128, 512, 1024]),
    ({"hidden": "64", "layers": 2}, [64, 64]),
])
def test_units(settings, units):
    assert Config(**settings).units == units


@pytest.mark.parametrize("settings", [
    {"hidden": "128,"}, {"hidden": "128,0"}, {"hidden": "wide"},
    {"hidden": "128,512", "layers": 3}, {"hidden": "128,512", "layers": 1}])
def test_wrong_units(settings):
    message = rf"`hidden` \({settings['hidden']}\) must be .*\nWrite for example --hid"
    with pytest.raises(mpl.ConfigError, match=message):
        Config(**settings)


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
def test_two_steps(policy, replicas, folder, strategy_of):
    experiment = two_steps(
        MnistMlp, strategy_of(replicas), policy=policy, data_dir=folder,
        global_batch_size=16)
    assert experiment.model.count_params() == 784 * 128 + 128 + 128 * 10 + 10
    assert experiment.train_report()["applied_steps"] == 2


def test_the_network_by_numpy(folder, strategy_of):
    experiment = MnistMlp()
    experiment.setup(Config(policy="float32", data_dir=folder, hidden="32,16",
                            global_batch_size=4), strategy_of(1))
    image, label = examples("test")
    x = image.reshape(10, 784) / 255
    *hidden, (w, b) = [(experiment.model.weights[i].numpy(),
                        experiment.model.weights[i + 1].numpy()) for i in (0, 2, 4)]
    for kernel, bias in hidden:
        x = np.maximum(x @ kernel + bias, 0)
    logits = x @ w + b
    assert [kernel.shape for kernel, _ in hidden] == [(784, 32), (32, 16)]
    np.testing.assert_allclose(
        experiment.model(image[..., np.newaxis]), logits, rtol=1e-4, atol=1e-5)
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    values = experiment.evaluators["test"].evaluate()
    loss = -np.log(shares[np.arange(10), label]).mean()
    assert float(values["loss"]) == pytest.approx(loss, rel=1e-5)
    right = np.mean(logits.argmax(1) == label)
    assert float(values["accuracy"]) == pytest.approx(right)


@pytest.mark.slow
def test_resume_export_predict(folder, tmp_path):
    _, got = resumed(MnistMlp, tmp_path, data_dir=folder, global_batch_size=16,
                     atol=0.02)
    assert got.shape == (10, 10)


@pytest.mark.slow
def test_it_learns_digits_in_bfloat16(tmp_path):
    results = run(MnistMlp, tmp_path, layers=2)
    assert "--policy=mixed_bfloat16\n" in (tmp_path / "flagfile.txt").read_text()
    assert results["test"]["accuracy"] > 0.9  # three seeds: 0.969 to 0.981
