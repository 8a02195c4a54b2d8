"""The ResNet is the paper's, and learns; its crops go on where a run stopped."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import mpl
from experiments.cifar_resnet import CifarResnet, Config
from experiments.models.resnet import resnet
from test_cifar_data import records, write
from whole_runs import POLICIES, predictions, resumed, run, two_steps


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return write(tmp_path / "cifar", monkeypatch)


def prepared(strategy, **settings):
    experiment = CifarResnet()
    experiment.setup(
        Config(**{"depth": 8, "policy": "float32", **settings}), strategy)
    return experiment


@pytest.mark.slow
@pytest.mark.parametrize("depth, convolutions, statistics", [
    # Weights of 3×3 kernels: 27·16, then 2n, 2n and 2n of 16, 32 and 64 filters, of
    # which the first of a size comes from half as many.
    (20, 432 + 6 * 2304 + 4608 + 5 * 9216 + 18432 + 5 * 36864, 16 + 6 * 112),
    (56, 432 + 18 * 2304 + 4608 + 17 * 9216 + 18432 + 17 * 36864, 16 + 18 * 112),
])
def test_the_weights_are_those_of_the_paper(depth, convolutions, statistics):
    model = resnet(depth, 10)
    trained = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    assert trained == convolutions + 2 * statistics + 650
    # Table 6 of the paper, in millions.
    assert round(trained / 1e6, 2) == {20: 0.27, 56: 0.85}[depth]
    assert len([v for v in model.trainable_variables if len(v.shape) > 1]) == depth
    projected = resnet(depth, 10, projection=True)
    assert projected.count_params() == model.count_params() + 16 * 32 + 32 * 64


def test_a_shortcut_has_every_second_pixel_and_zeros():
    model = resnet(8, 10)
    add = [layer for layer in model.layers if type(layer).__name__ == "Add"][1]
    inside = keras.Model(model.input, add.input)
    image = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    shortcut, _ = inside(image)
    first = [layer for layer in model.layers if type(layer).__name__ == "ReLU"][2]
    before = keras.Model(model.input, first.output)(image).numpy()
    assert shortcut.shape == (2, 16, 16, 32)
    np.testing.assert_array_equal(shortcut[..., 8:24], before[:, ::2, ::2])
    assert before.any() and not shortcut[..., :8].numpy().any()
    assert not shortcut[..., 24:].numpy().any()


def test_a_stride_takes_the_pixels_that_the_shortcut_takes():
    """As in the paper: one pixel of zeros on each side, kernels on even pixels."""
    model = resnet(8, 10)
    layers = model.layers
    number, = (i for i, layer in enumerate(layers) if layer.name.startswith("conv")
               and layer.filters == 32 and layer.strides == (2, 2))
    convolution = layers[number]
    before = next(layer for layer in layers[number::-1] if isinstance(
        layer, keras.layers.ReLU))
    kernel = np.zeros((3, 3, 16, 32), np.float32)
    kernel[1, 1, :, :16] = np.eye(16)
    kernel[0, 2, :, 16:] = np.eye(16)
    convolution.kernel.assign(kernel)
    image = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    x, y = keras.Model(model.input, [before.output, convolution.output])(image)
    around = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    np.testing.assert_allclose(y[..., :16], x.numpy()[:, ::2, ::2], rtol=1e-6)
    np.testing.assert_allclose(y[..., 16:], around[:, 0:32:2, 2:34:2], rtol=1e-6)


def test_images_of_cifar_are_surrounded_by_its_mean(folder, strategy_of):
    """As in the paper, whose images are padded when the mean is 0."""
    experiment = prepared(strategy_of(1), data_dir=folder, global_batch_size=16)
    batch = next(iter(experiment.pipelines["train"].dataset()))
    corners = {tuple(pixel) for row, column in ((0, 0), (0, 31), (31, 0), (31, 31))
               for pixel in batch["image"][:, row, column].numpy()}
    assert (120, 120, 120) in corners and (0, 0, 0) not in corners
    digits = prepared(strategy_of(1), global_batch_size=16)
    batch = next(iter(digits.pipelines["train"].dataset()))
    assert not (batch["image"].numpy() == 120).any()
    rescaling = next(layer for layer in experiment.model.layers
                     if isinstance(layer, keras.layers.Rescaling))
    assert not rescaling(np.full((1, 1, 1, 3), 120, np.uint8)).numpy().any()


@pytest.mark.parametrize("settings, message", [
    ({"depth": 21}, r"`depth` \(21\) must be 6n \+ 2"),
    ({"shortcut": "option_a"}, "`shortcut` .* must be identity or projection"),
    ({"dataset": "cifar"}, "`dataset` .* must be cifar10 or cifar100"),
])
def test_wrong_settings(settings, message):
    with pytest.raises(mpl.ConfigError, match=message):
        Config(**settings)


def test_momentum_is_of_sgd_alone(strategy_of):
    sgd = prepared(strategy_of(1), momentum=0.5)
    assert sgd.optimizer.inner.momentum == 0.5
    adam = prepared(strategy_of(1), optimizer="adam")
    assert not hasattr(adam.optimizer.inner, "momentum")
    with pytest.raises(mpl.ConfigError) as error:
        prepared(strategy_of(1), optimizer="rmsprop", momentum=0.5)
    assert str(error.value) == (
        "`momentum` (0.5) has no effect on `optimizer` (rmsprop).\n"
        "Leave it out, or use --optimizer=sgd.")


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
def test_two_steps(policy, replicas, folder, strategy_of):
    experiment = two_steps(
        CifarResnet, strategy_of(replicas), policy=policy, data_dir=folder, depth=8,
        global_batch_size=16)
    assert experiment.num_examples == {"train": 36, "validation": 4, "test": 8}


@pytest.mark.slow
def test_an_update_by_hand(folder, strategy_of):
    """v ← 0.9 v − rate (∂loss/∂w + decay w) for kernels; others do not decay."""
    settings = dict(data_dir=folder, global_batch_size=16, learning_rate=0.5,
                    lr_schedule="constant", kernel_decay=0.25)
    experiment = prepared(strategy_of(1), **settings)
    model, batches = experiment.model, experiment.pipelines["train"].dataset()
    want = [v.numpy() for v in model.trainable_variables]
    speeds = [np.zeros_like(value) for value in want]
    for batch in batches.take(2):
        with tf.GradientTape() as tape:
            losses = experiment.loss(batch, training=True).per_example
            loss = tf.reduce_sum(losses * batch["weight"]) / tf.reduce_sum(
                batch["weight"])
        state = [v.numpy() for v in model.non_trainable_variables]
        gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
        for i, gradient in enumerate(gradients):
            decay = 0.25 * want[i] if want[i].ndim > 1 else 0
            speeds[i] = 0.9 * speeds[i] - 0.5 * (gradient.numpy() + decay)
            want[i] = want[i] + speeds[i]
            model.trainable_variables[i].assign(want[i])
    other = prepared(strategy_of(1), **settings)
    other.trainer.train(2)
    for variable, value in zip(other.model.trainable_variables, want):
        np.testing.assert_allclose(variable.numpy(), value, rtol=2e-3, atol=2e-4)
    for variable, value in zip(other.model.non_trainable_variables, state):
        np.testing.assert_allclose(variable.numpy(), value, rtol=2e-3, atol=2e-4)


def test_images_are_cropped_and_mirrored_the_same_on_resume(folder, strategy_of):
    experiment = prepared(strategy_of(1), data_dir=folder, global_batch_size=16)
    data = experiment.pipelines["train"]
    batches = list(data.dataset().take(7))
    for position, batch in zip((3, 4, 5), data.dataset(3)):
        for name in ("image", "label"):
            np.testing.assert_array_equal(batch[name], batches[position][name])
    assert batches[0]["image"].shape == (16, 32, 32, 3)
    # Each epoch, of 3 batches, has crops of its own: each record's differ.
    originals = {row[1:].reshape(3, 32, 32).transpose(1, 2, 0).tobytes()
                 for number in range(5) for row in records(number, 8)}
    seen = [image.numpy().tobytes() for batch in batches[:6]
            for image, weight in zip(batch["image"], batch["weight"]) if weight]
    assert len(seen) == 72 and len(set(seen)) > 60
    assert len(originals & set(seen)) < 10  # 1 in 81 is in the middle, half mirrored
    validation = next(iter(experiment.pipelines["validation"].dataset()))
    assert {image.numpy().tobytes() for image in validation["image"]} <= originals


@pytest.mark.slow
def test_resume_export_predict(folder, tmp_path):
    _, got = resumed(
        CifarResnet, tmp_path, policy="mixed_bfloat16", data_dir=folder, depth=8,
        global_batch_size=16, learning_rate=0.01, atol=0.05)
    assert got.shape == (8, 10)
    run(CifarResnet, tmp_path / "parts", mode="predict",
        input=f"{folder}/cifar-10-batches-bin/test_batch.bin")
    np.testing.assert_allclose(predictions(tmp_path / "parts"), got, atol=1e-6)


def test_a_file_to_predict_is_read_whole(folder):
    experiment = CifarResnet()
    experiment.config = Config(global_batch_size=4)
    part, = experiment.read_input(f"{folder}/cifar-10-batches-bin/test_batch.bin")
    want = records(5, 8)[:, 1:].reshape(8, 3, 32, 32).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(part["image"], want)


@pytest.mark.slow
def test_it_learns_digits(tmp_path):
    results = run(CifarResnet, tmp_path, depth=8, global_batch_size=32, train_epochs=4,
                  policy="float32")
    assert results["test"]["accuracy"] > 0.8  # three seeds: 0.90 to 0.91


@pytest.mark.slow
def test_cifar100_runs_without_validation(tmp_path, monkeypatch):
    folder = write(tmp_path / "data", monkeypatch, "cifar100", 20)
    results = run(CifarResnet, tmp_path / "run", data_dir=folder, dataset="cifar100",
                  holdout=False, depth=8, global_batch_size=10, train_epochs=1)
    assert results.keys() == {"train", "test"}
    assert np.isfinite(results["test"]["loss"])
