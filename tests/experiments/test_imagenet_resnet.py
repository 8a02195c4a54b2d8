"""The ImageNet binary trains on records, in every policy, and learns."""

import json

import imagenet_records
import keras
import numpy as np
import pytest
import tensorflow as tf

import mpl
from experiments import imagenet_resnet
from experiments.imagenet_resnet import Config, ImagenetResnet
from experiments.models import bottleneck
from experiments.optimizers.lars import Lars
from mpl.record.checkpoint import Checkpoints

POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")
SMALL = dict(depth="14", width=4, image_size=32, global_batch_size=4, train_steps=4,
             train_epochs=None)


def prepared(strategy, **settings):
    experiment = ImagenetResnet()
    experiment.setup(Config(**{**SMALL, **settings}), strategy)
    return experiment


@pytest.fixture
def data_dir(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    imagenet_records.write_greys(folder, "train")
    imagenet_records.write_greys(folder, "validation", files=1)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
def test_two_steps_on_records(policy, replicas, data_dir, strategy_of):
    experiment = prepared(strategy_of(replicas), policy=policy, data_dir=data_dir,
                          image_size=64)  # of 32 two are normalised by two values
    experiment.trainer.train(2)
    report = experiment.train_report()
    assert report["applied_steps"] == 2 and report["grad_norm"] > 0
    values = experiment.evaluators["validation"].evaluate(-1)
    assert np.isfinite(float(values["loss"]))
    assert 0 <= float(values["top_1"]) <= float(values["top_5"]) <= 1


@pytest.mark.slow
def test_a_run_trains_goes_on_exports_and_predicts(data_dir, tmp_path):
    settings = {**SMALL, "data_dir": data_dir, "workdir": str(tmp_path / "run"),
                "policy": "mixed_bfloat16", "lr_schedule": "constant",
                "learning_rate": 1e-3}  # chances that are not 0 or 1 can be ranked
    mpl.run(ImagenetResnet, **{**settings, "train_steps": 2})
    results = mpl.run(ImagenetResnet, **settings, mode="all")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert max(json.loads(line)["step"] for line in lines) == 4
    chances = np.load(tmp_path / "run" / "predictions.npz")["predictions"]
    assert chances.shape == (5, 1000)
    np.testing.assert_allclose(chances.sum(1), 1, rtol=1e-3)
    labels = np.arange(5)  # of the validation's greys
    above = (chances > chances[labels, labels][:, np.newaxis]).sum(1)
    for name, most in (("top_1", 1), ("top_5", 5)):
        assert results["validation"][name] == pytest.approx(np.mean(above < most))
    images = tmp_path / "images"
    images.mkdir()
    for name, level in (("a.jpg", 20), ("b.jpg", 200)):
        (images / name).write_bytes(imagenet_records.grey(level))
    mpl.run(ImagenetResnet, **{**settings, "mode": "predict"}, input=str(images),
            output=str(tmp_path / "own.npz"))
    own = np.load(tmp_path / "own.npz")
    assert own["predictions"].shape == (2, 1000)
    assert list(own["image_file"]) == [str(images / n) for n in ("a.jpg", "b.jpg")]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_a_restored_run_continues_bit_for_bit(
    optimizer, data_dir, strategy_of, tmp_path
):
    settings = dict(policy="mixed_float16", data_dir=data_dir, optimizer=optimizer)
    whole = prepared(strategy_of(1), **settings)
    whole.trainer.train(2)
    Checkpoints(
        tmp_path / "run", asynchronous=False, **whole.checkpoint_objects()).save(2)
    whole.trainer.train(2)
    rest = prepared(strategy_of(1), **settings)
    assert Checkpoints(tmp_path / "run", **rest.checkpoint_objects()).resume() == 2
    rest.after_restore()
    rest.trainer.train(2)
    for ours, theirs in zip(rest.model.weights, whole.model.weights, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    slots = [each.optimizer.export_slots() for each in (rest, whole)]
    for key, value in slots[1].items():
        np.testing.assert_array_equal(slots[0][key], value, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer, rate", [("sgd", 0.1), ("lars", 4.0)])
def test_it_learns(optimizer, rate, tmp_path, strategy_of):
    """Dark from bright, of pictures that it sees another part of each time."""
    random = np.random.default_rng(0)

    def records(count):
        for number in range(count):
            level, label = (40, 1) if number % 2 else (200, 1000)
            pixels = level + random.integers(-30, 30, (40, 50, 3))
            yield imagenet_records.record(
                tf.io.encode_jpeg(pixels.astype(np.uint8)).numpy(), label)

    imagenet_records.write(tmp_path, "train", [records(32), records(32)])
    imagenet_records.write(tmp_path, "validation", [records(32)])
    experiment = prepared(
        strategy_of(1), data_dir=str(tmp_path), optimizer=optimizer, l2=1e-4,
        learning_rate=rate, train_steps=60, global_batch_size=16, policy="float32")
    experiment.trainer.train(60)
    values = experiment.evaluators["validation"].evaluate(-1)
    assert float(values["top_1"]) >= 0.9


def test_labels_are_smoothed_in_training_alone(strategy_of):
    experiment = prepared(strategy_of(1), synthetic=True, policy="float32")
    batch = next(iter(experiment.pipelines["train"].dataset()))
    with experiment.weights.bound(experiment.weights.cast()):
        training = experiment.loss(batch, training=True)
        logits = training.outputs[1].numpy().astype(np.float64)
        evaluation = experiment.loss(batch, training=False)
        plain = evaluation.outputs[1].numpy().astype(np.float64)

    def log_softmax(values):
        return values - np.log(np.exp(values).sum(1, keepdims=True))

    rows, label = np.arange(len(logits)), batch["label"].numpy()
    chances = log_softmax(logits)
    want = -(0.9 * chances[rows, label] + 0.1 * chances.mean(1))
    np.testing.assert_allclose(training.per_example, want, rtol=1e-5)
    np.testing.assert_allclose(
        evaluation.per_example, -log_softmax(plain)[rows, label], rtol=1e-5)


def test_l2_is_of_the_model_or_of_lars(strategy_of):
    settings = dict(synthetic=True, l2=0.25, momentum=0.5, policy="float32")
    sgd = prepared(strategy_of(1), **settings)
    kernel = next(w for w in sgd.model.trainable_variables if w.ndim == 4)
    assert float(kernel.regularizer(tf.constant([3.0]))) == pytest.approx(9 * 0.25 / 2)
    norms = [w for w in sgd.model.trainable_variables if w.ndim == 1]
    assert norms and all(w.regularizer is None for w in norms)
    assert sgd.optimizer.inner.momentum == 0.5
    lars = prepared(strategy_of(1), optimizer="lars", **settings)
    assert all(w.regularizer is None for w in lars.model.trainable_variables)
    assert isinstance(lars.optimizer.inner, Lars)
    assert (lars.optimizer.inner.l2, lars.optimizer.inner.momentum) == (0.25, 0.5)


def test_momentum_is_of_sgd_and_lars_alone(strategy_of):
    settings = dict(synthetic=True, optimizer="rmsprop", policy="float32")
    assert prepared(strategy_of(1), **settings).optimizer.inner.momentum == 0
    with pytest.raises(mpl.ConfigError) as error:
        prepared(strategy_of(1), momentum=0.5, **settings)
    assert str(error.value) == (
        "`momentum` (0.5) has no effect on `optimizer` (rmsprop).\n"
        "Leave it out, or use --optimizer=sgd or --optimizer=lars.")


def test_synthetic_pixels_are_named(data_dir, strategy_of, capsys):
    experiment = prepared(strategy_of(1), synthetic=True, policy="float32")
    assert "synthetic train: random pixels" in capsys.readouterr().out
    assert list(experiment.metrics()) == ["synthetic_top_1", "synthetic_top_5"]
    assert experiment.headline() == "synthetic_top_1"
    real = prepared(strategy_of(1), data_dir=data_dir, policy="float32")
    assert list(real.metrics()) == ["top_1", "top_5"]


def test_synthetic_pixels_do_not_stand_for_a_folder():
    with pytest.raises(mpl.ConfigError, match=r"`data_dir` \(imagenet\) is not read .*"
                       r"`synthetic`.*\nLeave one of the two out"):
        Config(synthetic=True, data_dir="imagenet")


def test_without_records_nothing_is_trained(strategy_of):
    with pytest.raises(mpl.ConfigError, match="(?s)Split train: .*image-net.org"):
        prepared(strategy_of(1), policy="float32")


@pytest.mark.slow
def test_it_is_resnet_50_version_1_5():
    model = bottleneck.resnet(
        "50", 1000, 224, mean=imagenet_resnet.imagenet.MEAN,
        stddev=imagenet_resnet.imagenet.STDDEV)
    # As torchvision counts those of its resnet50, which is v1.5.
    assert sum(int(np.prod(w.shape)) for w in model.trainable_weights) == 25_557_032
    convolutions = [x for x in model.layers if isinstance(x, keras.layers.Conv2D)]
    assert len(convolutions) == 53
    with_stride = [x.kernel_size for x in convolutions if x.strides == (2, 2)]
    assert sorted(with_stride) == [(1, 1)] * 3 + [(3, 3)] * 3 + [(7, 7)]
    shortcuts = [x for x in convolutions if x.kernel_size == (1, 1)
                 and x.strides == (2, 2)]
    assert [x.filters for x in shortcuts] == [512, 1024, 2048]


def test_pixels_are_normalised():
    model = bottleneck.resnet(
        "14", 10, 32, mean=(100, 110, 120), stddev=(10, 20, 50), width=4)
    rescaling = next(x for x in model.layers if isinstance(x, keras.layers.Rescaling))
    pixels = np.array([[[[100, 130, 20]]]], np.uint8)
    np.testing.assert_allclose(rescaling(pixels)[0, 0, 0], [0, 1, -2], atol=1e-5)


def test_a_stride_centres_every_kernel_on_even_pixels():
    """Also those beside a shortcut, whose 1×1 kernels take these pixels."""
    model = bottleneck.resnet("14", 10, 64, mean=(0, 0, 0), stddev=(1, 1, 1), width=4)
    image = np.random.default_rng(0).integers(0, 255, (1, 64, 64, 3)).astype(np.uint8)
    seen = set()
    for number, layer in enumerate(model.layers):
        if isinstance(layer, keras.layers.Conv2D) and layer.strides == (2, 2):
            size, channels = layer.kernel_size[0], layer.kernel.shape[2]
            kernel = np.zeros(layer.kernel.shape, np.float32)
            kernel[size // 2, size // 2, 0, 0] = 1
            layer.kernel.assign(kernel)
            padding = model.layers[number].input._keras_history.operation
            x, y = keras.Model(model.input, [padding.input, layer.output])(image)
            assert x.shape[-1] == channels
            np.testing.assert_allclose(y[..., 0], x.numpy()[:, ::2, ::2, 0], rtol=1e-6)
            seen.add(size)
    assert seen == {1, 3, 7}
