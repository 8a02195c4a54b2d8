import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from mpl.errors import CheckpointError, ConfigError
from mpl.record.export import SavedPredictor, export_saved_model

SPEC = {"image": tf.TensorSpec([4, 4, 1], tf.uint8), "size": tf.TensorSpec([])}
INFO = {"policy": "mixed_bfloat16", "step": 7, "metrics": ["accuracy"]}


def model_of() -> keras.Model:
    layers = keras.layers
    image = layers.Flatten()
    inputs = [keras.Input([4, 4, 1]), keras.Input([])]
    features = layers.Concatenate()([image(inputs[0]), inputs[1][:, None]])
    features = layers.BatchNormalization()(layers.Dense(8, activation="relu")(features))
    return keras.Model(inputs, layers.Dense(3)(features))


def batch_of(size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(size)
    image = rng.integers(0, 255, [size, 4, 4, 1], np.uint8)
    return {"image": image, "size": rng.random(size, np.float32)}


def predict_with(model, dtype=tf.float32, copies=()):
    """Returns a predict function that reads constant `copies` of the variables."""

    def predict(features):
        image = tf.cast(features["image"], dtype) / 255
        with keras.StatelessScope() as scope:
            for variable, copy in copies:
                scope.add_update((variable, copy))
            logits = model([image, tf.cast(features["size"], dtype)], training=False)
        return tf.nn.softmax(tf.cast(logits, tf.float32))

    return predict


def export_float32(path, model, run="run 1"):
    return export_saved_model(
        model, predict_with(model), SPEC, path, run=run, info=INFO
    )


def export_constants(path, dtype):
    """Exports a model whose trainable weights are constants of the compute dtype."""
    keras.config.set_dtype_policy(f"mixed_{dtype.name}")
    model = model_of()
    copies = [
        (variable, tf.cast(variable.value, dtype))
        for variable in model.trainable_variables
        if "batch_norm" not in variable.path
    ]
    predict = predict_with(model, dtype, copies)
    export_saved_model(model, predict, SPEC, path, run="run 1", info=INFO)
    return predict


@pytest.mark.slow
def test_a_fresh_process_predicts_alike(tmp_path):
    model = model_of()
    expected = {"float32": predict_with(model)(batch_of(5)).numpy()}
    export_float32(tmp_path / "float32", model)
    for dtype in (tf.bfloat16, tf.float16):
        predict = export_constants(tmp_path / dtype.name, dtype)
        expected[dtype.name] = predict(batch_of(5)).numpy()
    np.savez(tmp_path / "batch.npz", **batch_of(5))
    code = """if True:
        import sys, numpy as np
        from mpl.record.export import SavedPredictor
        folder, *names = sys.argv[1:]
        batch = dict(np.load(f"{folder}/batch.npz"))
        outputs = {name: SavedPredictor(f"{folder}/{name}")(batch) for name in names}
        np.savez(f"{folder}/outputs.npz", **outputs)
    """
    command = [sys.executable, "-c", code, str(tmp_path), *expected]
    subprocess.run(command, check=True, cwd=os.getcwd())
    outputs = np.load(tmp_path / "outputs.npz")
    np.testing.assert_allclose(outputs["float32"], expected["float32"], atol=1e-6)
    # The same operations, but a graph may fuse casts: within a rounding or two.
    np.testing.assert_allclose(outputs["bfloat16"], expected["bfloat16"], atol=2e-2)
    np.testing.assert_allclose(outputs["float16"], expected["float16"], atol=2e-3)


def test_any_batch_size_and_names_that_are_no_features(tmp_path):
    model = model_of()
    predict = SavedPredictor(export_float32(str(tmp_path / "export"), model))
    for size in (1, 2, 9):
        batch = batch_of(size)
        outputs = predict({**batch, "label": np.zeros(size)})
        assert isinstance(outputs, np.ndarray) and outputs.shape == (size, 3)
        np.testing.assert_allclose(outputs, predict_with(model)(batch), atol=1e-6)
    wide = {"image": batch["image"].astype(np.int64), "size": batch["size"].tolist()}
    np.testing.assert_allclose(predict(wide), outputs, atol=1e-6)


def test_serving_default_takes_features_by_name(tmp_path):
    path = export_float32(str(tmp_path / "export"), model_of())
    signature = tf.saved_model.load(path).signatures["serving_default"]
    specs = signature.structured_input_signature[1]
    assert specs["image"] == tf.TensorSpec([None, 4, 4, 1], tf.uint8, "image")
    assert specs["size"] == tf.TensorSpec([None], tf.float32, "size")
    assert list(signature.structured_outputs) == ["predictions"]


def test_several_outputs_come_back_by_name(tmp_path):
    scale = tf.Module()
    scale.factor = tf.Variable(2.0)

    def predict(features):
        return {"double": features["x"] * scale.factor, "sign": tf.sign(features["x"])}

    spec = {"x": tf.TensorSpec([2])}
    export_saved_model(scale, predict, spec, tmp_path / "e", run="r", info={})
    outputs = SavedPredictor(tmp_path / "e")({"x": [[1.0, -3.0]]})
    np.testing.assert_array_equal(outputs["double"], [[2.0, -6.0]])
    np.testing.assert_array_equal(outputs["sign"], [[1.0, -1.0]])


def test_info_says_where_it_comes_from(tmp_path):
    export_float32(tmp_path / "export", model_of())
    info = json.loads((tmp_path / "export" / "mpl_export.json").read_text())
    versions = info.pop("versions")
    assert info == {"run": "run 1", **INFO}
    assert versions["tensorflow"] == tf.__version__
    assert set(versions) == {"tensorflow", "keras", "numpy"}


def test_replaces_an_export_of_the_same_run_only(tmp_path):
    path, model = tmp_path / "export", model_of()
    export_float32(path, model)
    for variable in model.trainable_variables:
        variable.assign(tf.zeros_like(variable))
    with pytest.raises(ConfigError, match="is not an export of this run"):
        export_float32(path, model, run="run 2")
    assert np.ptp(SavedPredictor(path)(batch_of(1))) > 0  # the old one still
    export_float32(path, model)
    assert np.ptp(SavedPredictor(path)(batch_of(1))) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"run": "run 2"}'])
def test_refuses_to_overwrite_anything_else(tmp_path, content):
    path = tmp_path / "mine"
    path.mkdir()
    if content is not None:
        (path / "mpl_export.json").write_text(content)
    before = sorted(path.iterdir())
    with pytest.raises(ConfigError, match="exists and is not an export"):
        export_float32(path, model_of())
    assert sorted(path.iterdir()) == before


def test_a_failed_export_keeps_the_old_one(tmp_path):
    path, model = tmp_path / "export", model_of()
    export_float32(path, model)
    stranger = tf.Variable([1.0])  # not held by the module, so it cannot be saved

    def predict(features):
        return features["size"] * stranger

    with pytest.raises(AssertionError, match="untracked"):
        export_saved_model(model, predict, SPEC, path, run="run 1", info=INFO)
    assert SavedPredictor(path)(batch_of(2)).shape == (2, 3)
    assert [file.name for file in tmp_path.iterdir()] == ["export"]


def test_unwritable_path(tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    with pytest.raises(CheckpointError, match="cannot be written"):
        export_float32(file / "export", model_of())
    assert file.read_text() == "kept"


def test_no_saved_model(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ConfigError, match="is no SavedModel"):
            SavedPredictor(path)


def test_damaged_saved_model(tmp_path):
    path = tmp_path / "export"
    export_float32(path, model_of())
    (path / "saved_model.pb").write_bytes(b"no proto")
    with pytest.raises(CheckpointError, match="cannot be read"):
        SavedPredictor(path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image": None}, r"`image` \(missing\) must be uint8 \(None, 4, 4, 1\)"),
        ({"image": np.zeros([2, 4, 4], np.uint8)}, r"`image` \(uint8 \(2, 4, 4\)\)"),
        ({"image": np.zeros([0, 4, 4, 1], np.uint8)}, "must be uint8"),
        ({"image": np.full([2, 4, 4, 1], 300)}, r"`image` \(int64 .* must be uint8"),
        ({"image": np.full([2, 4, 4, 1], 0.5)}, r"`image` \(float64 .* must be uint8"),
        ({"size": 1.0}, r"`size` \(float64 \(\)\) must be float32 \(None,\)"),
    ],
)
def test_wrong_features(tmp_path, change, message):
    predict = SavedPredictor(export_float32(str(tmp_path / "export"), model_of()))
    batch = {**batch_of(2), **change}
    batch = {name: value for name, value in batch.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        predict(batch)
