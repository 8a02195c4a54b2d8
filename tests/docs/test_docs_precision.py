"""What docs/precision.md says of dtypes, islands, scales and skips."""

import pathlib
import re

import doc_pages
import keras
import numpy as np
import pytest
import tensorflow as tf

import mpl
from mpl.precision import auto_policy

PAGE = doc_pages.page("precision.md")


@pytest.fixture(scope="module")
def names():
    names, count = doc_pages.executed("precision.md", {"__name__": "page"})
    assert count == 3
    return names


def setup(kind, train_epochs=None, **settings):
    config = kind.Config(train_epochs=train_epochs, **settings)
    experiment = kind()
    experiment.setup(config, tf.distribute.OneDeviceStrategy("CPU:0"))
    return experiment


def compute_dtypes(experiment):
    """From the name of a variable to what the model reads it as."""
    return {entry.name: bucket.kind.compute for bucket in experiment.weights.buckets
            for entry in bucket.entries}


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_a_module_casts_by_hand(names, policy):
    experiment = setup(
        names["MlpDigits"], policy=policy, train_steps=60, learning_rate=0.01)
    compute = experiment.policy.compute_dtype
    assert set(compute_dtypes(experiment).values()) == {compute}
    assert {v.dtype for v in experiment.model.trainable_variables} == {tf.float32}
    seen = []
    whole = tf.nn.relu
    try:
        tf.nn.relu = lambda x: seen.append(x.dtype) or whole(x)
        experiment.trainer.train(60)
    finally:
        tf.nn.relu = whole
    assert set(seen) == {compute}
    assert experiment.evaluators["test"].evaluate()["accuracy"] > 0.6
    prediction = experiment.predictor()({"image": np.zeros([2, 8, 8, 1], np.uint8)})
    assert prediction.dtype == np.float32 and prediction.shape == (2, 10)


def test_islands(names):
    experiment = setup(names["Careful"], policy="mixed_bfloat16", train_steps=2)
    flatten, scores, by_itself, wrapped, free, head = experiment.model.layers
    assert [layer.compute_dtype for layer in experiment.model.layers] == [
        "bfloat16", "float32", "float32", "float32", "bfloat16", "float32"]
    assert wrapped.layer.compute_dtype == "float32"
    dtypes = compute_dtypes(experiment)
    assert {name for name, dtype in dtypes.items() if dtype == tf.bfloat16} == {
        weight.path for weight in free.trainable_weights}
    experiment.trainer.train(2)
    wrong = type("Wrong", (names["Careful"],), {
        "policy_overrides": {"/scroes$": "float32"}})
    with pytest.raises(mpl.ConfigError, match=r"path of no layer.*\n.*/scores"):
        setup(wrong, policy="mixed_bfloat16", train_steps=2)


def test_the_table_of_dtypes():
    policy = mpl.get_policy("mixed_bfloat16")
    with policy.scope():
        model = keras.Sequential([
            keras.Input((4,), dtype="int32"), keras.layers.Embedding(3, 8),
            keras.layers.Flatten(), keras.layers.Dense(8),
            keras.layers.BatchNormalization(), keras.layers.Dense(2, dtype="float32")])
    weights = mpl.MasterWeights(model, policy)
    optimizer = mpl.LossScaleOptimizer(
        keras.optimizers.Adam(), "auto", weights, ema_decay=0.9)
    of_float32 = {"embeddings", "gamma", "beta"}
    for bucket in weights.buckets:
        assert bucket.variable.dtype == tf.float32
        for entry in bucket.entries:
            layer, _, name = entry.name.rpartition("/")
            is_head = layer.endswith(model.layers[-1].name)
            assert bucket.kind.compute == (
                tf.float32 if name in of_float32 or is_head else tf.bfloat16)
    assert {v.dtype for v in optimizer.averages} == {tf.float32}
    slots = [v for v in optimizer.inner.variables if v.dtype != "int64"]
    assert {v.dtype for v in slots} == {"float32"}
    assert {entry.value.dtype for entry in weights.state} == {tf.float32}
    seen = model.layers[2]
    assert seen(tf.zeros([1, 32])).dtype == tf.bfloat16  # an activation
    params = weights.cast()
    with tf.GradientTape() as tape:
        tape.watch(params)
        with weights.bound(params) as forward:
            losses = tf.reduce_sum(model(tf.zeros([2, 4], tf.int32), training=True), 1)
            output = mpl.LossOutput(losses, tf.ones([2]))
            scaled = optimizer.scale_loss(output, forward)
    assert {g.dtype for g in weights.gradients(tape, scaled, forward)} == {
        tf.float32, tf.bfloat16}  # as the backward pass leaves them


def test_the_scale(names, capsys):
    assert float(names["scale"].value) == 512.0
    assert names["optimizer"].loss_scale is names["scale"]
    scale = mpl.DynamicLossScale()
    assert (float(scale.value), scale.period) == (32_768, 2_000)
    assert (scale.minimum, scale.maximum) == (2**-14, 2**24)
    assert (scale.factor, scale.backoff, scale.hysteresis) == (2, 0.5, 1)
    assert "32,768 at first" in PAGE and "2,000 finite ones" in PAGE
    assert "below 2⁻¹⁴ or above 2²⁴" in PAGE
    smallest = np.nextafter(np.float16(0), np.float16(1))
    assert 5.9e-8 < float(smallest) < 6.0e-8  # the 6e-8 of the page


def test_the_report_of_skips(names):
    class Bad(names["Digits"]):

        def build_model(self):
            return keras.Sequential([
                keras.Input((8, 8, 1)), keras.layers.Flatten(),
                keras.layers.Dense(10, name="scores")])

        def loss(self, batch, training):
            logits = tf.cast(self.model(batch["image"]), tf.float32)
            return mpl.LossOutput(
                tf.reduce_sum(logits, 1) * 1e30, batch["weight"],
                (batch["label"], logits))

    experiment = setup(Bad, policy="mixed_float16", train_steps=60)
    experiment.trainer.train(60)
    assert int(experiment.global_step) == int(experiment.optimizer.skipped_steps) == 50
    assert int(experiment.optimizer.applied_steps) == 0
    shown = doc_pages.block(PAGE, "", "At step 50").splitlines()
    said = str(experiment.trainer.nonfinite_error()).splitlines()
    assert said[1] == shown[1]
    parts = re.fullmatch(r"(.*: )inf in 'sequential\w*/(scores/\w+)'( at .*)", said[0])
    assert parts, said
    assert shown[0] == f"{parts[1]}inf in 'sequential/{parts[2]}'{parts[3]}"


def test_the_devices_of_the_table(monkeypatch):
    def policy(gpu=None, flags=""):
        found = [tf.config.PhysicalDevice("GPU:0", "GPU")] if gpu else []
        monkeypatch.setattr(tf.config, "get_visible_devices", lambda *_: found)
        monkeypatch.setattr(tf.config.experimental, "get_device_details",
                            lambda _: {"compute_capability": gpu})
        monkeypatch.setattr("mpl.precision.policy._read_cpu_flags", lambda: flags)
        return auto_policy()[0]

    cells = re.findall(r"^\| (.*?) \| `(\w+)` \|", PAGE, re.MULTILINE)
    table = {device: name for device, name in cells if name in (
        "mixed_bfloat16", "mixed_float16", "float32")}
    assert list(table.values()) == [
        policy((8, 0)), policy((7, 5)), policy((6, 1)),
        policy(flags="flags : avx512_bf16"), policy(flags="flags : avx2")]


def test_the_figures_are_those_of_the_notes():
    notes = (pathlib.Path(doc_pages.ROOT) / "BUILD_NOTES.md").read_text("utf-8")
    for line in ("| float32 | 4.7e-8 |", "| mixed_bfloat16 | 4.35e-4 |",
                 "| mixed_float16 | 5.4e-5 |", "| float32 | 0.9883 |",
                 "| mixed_bfloat16 | 0.9900 |", "| mixed_float16 | 0.9883 |",
                 "| 302 variables, bfloat16 ≤ 0.60 raw | 0.34 "):
        assert line in notes, line
    times = re.findall(r"≥ 1\.\d+ × our float32 \| (1\.\d\d)", notes)
    mlp, cnn, resnet, gpt = (f"{float(time):.1f}" for time in times)
    assert resnet == gpt and (
        f"an MLP {mlp} times, a CNN {cnn}, ResNet-20 and a small GPT {gpt}") in PAGE
