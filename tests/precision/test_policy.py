"""Policies: names, the rule of `auto`, and precision inside Keras models."""

import collections
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl import logging

from mpl.errors import ConfigError
from mpl.precision import Policy, auto_policy, get_policy
from mpl.precision import policy as policy_module

LINE = "params={},compute={},output={}"
F16, BF16, F32, F64 = tf.float16, tf.bfloat16, tf.float32, tf.float64


@pytest.mark.parametrize(
    "name, dtypes, canonical",
    [
        ("float32", (F32, F32, F32), "float32"),
        ("float64", (F64, F64, F64), "float64"),
        ("bfloat16", (BF16, BF16, BF16), "bfloat16"),
        ("float16", (F16, F16, F16), "float16"),
        ("mixed_float16", (F32, F16, F32), "mixed_float16"),
        ("mixed_bfloat16", (F32, BF16, F32), "mixed_bfloat16"),
        (
            LINE.format("float32", "bfloat16", "float32"),
            (F32, BF16, F32),
            "mixed_bfloat16",
        ),
        # jmp's defaults: params float32, compute as params, output as compute.
        ("c=f16", (F32, F16, F16), LINE.format("float32", "float16", "float16")),
        (
            "p=f16,c=bf16",
            (F16,) + 2 * (BF16,),
            LINE.format("float16", *["bfloat16"] * 2),
        ),
        ("p=bf16", (BF16, BF16, BF16), "bfloat16"),
        ("o=double", (F32, F32, F64), LINE.format("float32", "float32", "float64")),
        (" o = full , c = half ", (F32, F16, F32), "mixed_float16"),
        ("f64", (F64, F64, F64), "float64"),
        ("native", (None, None, None), "native"),
    ],
)
def test_names(name, dtypes, canonical):
    policy = get_policy(name)
    assert (policy.param_dtype, policy.compute_dtype, policy.output_dtype) == dtypes
    assert policy.name == canonical
    assert get_policy(policy.name) == policy and get_policy(policy) is policy
    assert isinstance(policy, Policy) and hash(policy)


def test_half_is_bfloat16_where_there_is_a_tpu(monkeypatch):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [kind])
    assert get_policy("half").name == "bfloat16"


@pytest.mark.parametrize(
    "name, part",
    [
        ("mixed", "."),
        ("mixed_float32", "."),
        ("int8", "."),
        ("x=f16", ": 'x=f16'."),
        ("c=f16,c=f32", ": 'c=f32'."),
        ("c=f16,f32", ": 'f32'."),
        ("c=f16=f32", ": 'c=f16=f32'."),
        ("", "."),
        (None, "."),
    ],
)
def test_unknown_names(name, part):
    expected = rf"`policy` \({re.escape(str(name))}\) is not known{re.escape(part)}\n"
    with pytest.raises(ConfigError, match=expected) as error:
        get_policy(name)
    assert "mixed_bfloat16" in error.value.remedy


def test_casts():
    tree = {"x": tf.ones([2]), "label": tf.constant([1])}
    policy = get_policy("params=f64,compute=bf16,output=f16")
    for cast, dtype in (
        (policy.cast_to_param, F64),
        (policy.cast_to_compute, BF16),
        (policy.cast_to_output, F16),
    ):
        assert cast(tree)["x"].dtype == dtype and cast(tree)["label"].dtype == tf.int32
    native = get_policy("native")
    assert native.cast_to_compute(tree) is tree and native.cast_to_output(tree) is tree


Device = collections.namedtuple("Device", ["device_type", "compute_capability"])


@pytest.mark.parametrize(
    "devices, cpu_flags, expected, reason",
    [
        ([("TPU", None), ("CPU", None)], "", "mixed_bfloat16", "TPU"),
        ([("GPU", (9, 0)), ("CPU", None)], "", "mixed_bfloat16", "9.0"),
        ([("GPU", (8, 0))], "", "mixed_bfloat16", "8.0"),
        ([("GPU", (7, 5))], "avx512_bf16", "mixed_float16", "7.5"),
        ([("GPU", (7, 0)), ("GPU", (9, 0))], "", "mixed_float16", "7.0"),
        ([("GPU", (6, 1))], "", "float32", "6.1"),
        ([("GPU", None)], "", "float32", "0.0"),
        ([("CPU", None)], "fpu avx512_bf16 sse", "mixed_bfloat16", "avx512_bf16"),
        ([("CPU", None)], "fpu amx_bf16", "mixed_bfloat16", "amx_bf16"),
        ([("CPU", None)], "fpu avx512f avx512_bf16x", "float32", "without"),
        ([("CPU", None)], "", "float32", "without"),
    ],
)
def test_rule_of_auto(devices, cpu_flags, expected, reason, monkeypatch):
    def details(device):
        found = device.compute_capability
        return {"compute_capability": found} if found else {}

    found = [Device(*device) for device in devices]
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda: found)
    monkeypatch.setattr(tf.config.experimental, "get_device_details", details)
    monkeypatch.setattr(policy_module, "_read_cpu_flags", lambda: cpu_flags)
    name, why = auto_policy()
    assert name == expected and reason in why


def test_auto_reads_the_machine_and_logs_why(monkeypatch):
    lines = []
    monkeypatch.setattr(
        logging, "info", lambda text, *values: lines.append(text % values)
    )
    for flags, expected in (
        ("flags : avx512_bf16\n", "mixed_bfloat16"),
        ("", "float32"),
    ):
        monkeypatch.setattr(policy_module, "_read_cpu_flags", lambda flags=flags: flags)
        assert get_policy("auto").name == expected
        assert f"policy auto: {expected}, because of a CPU with" in lines[-1]


def test_auto_looks_at_visible_devices_only(monkeypatch):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda: [Device("TPU", 1)])
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda: [Device("CPU", None)])
    monkeypatch.setattr(policy_module, "_read_cpu_flags", lambda: "")
    assert auto_policy()[0] == "float32"


def test_no_cpuinfo_is_no_fast_bfloat16(monkeypatch):
    def absent(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", absent)
    name, _ = auto_policy()
    assert name == "float32"


@pytest.mark.parametrize(
    "name, expected",
    [
        ("mixed_bfloat16", "mixed_bfloat16"),
        ("c=f16", "mixed_float16"),
        ("o=f64", "float32"),
        ("bfloat16", "bfloat16"),
        ("native", "float64"),
    ],
)
def test_scope_sets_kerass_policy_and_puts_it_back(name, expected):
    keras.config.set_dtype_policy("float64")
    with get_policy(name).scope():
        assert keras.config.dtype_policy().name == expected
        layer = keras.layers.Dense(1)
    assert layer.dtype_policy.name == expected
    assert keras.config.dtype_policy().name == "float64"
    with pytest.raises(KeyError), get_policy(name).scope():
        raise KeyError
    assert keras.config.dtype_policy().name == "float64"


@pytest.mark.parametrize("name", ["p=f16,c=f32", "c=f64", "native"])
def test_policies_that_keras_does_not_have(name):
    with pytest.raises(ConfigError, match="none that Keras layers can"):
        _ = get_policy(name).keras_name


# Overrides.


def attention_model():
    with get_policy("mixed_bfloat16").scope():
        inputs = keras.Input([4, 3])
        block = keras.Sequential([keras.layers.Dense(3, name="inner")], name="block")
        x = block(inputs)
        x = keras.layers.MultiHeadAttention(2, 2, name="attention")(x, x)
        return keras.Model(inputs, keras.layers.Dense(2, name="head")(x))


def nested_layers(layer):
    """All layers, as a model's owner lists them; tests may look inside Keras."""
    return layer._flatten_layers()


def policies(layer):
    return {part.name: part.dtype_policy.name for part in nested_layers(layer)}


def test_overrides_set_the_policy_of_matching_layers_and_what_is_inside():
    keras.utils.clear_session()  # names of layers count from here
    model = attention_model()
    policy = get_policy("mixed_bfloat16", {"attention$": "float32", "^head": "c=f16"})
    policy.apply_overrides(nested_layers(model))
    found = policies(model)
    # The attention's softmax has no path of its own.
    inside = {"attention", "query", "key", "value", "attention_output", "softmax"}
    for name, set_to in found.items():
        expected = {"head": "mixed_float16", "dropout": "float32"}.get(name)
        assert set_to == ("float32" if name in inside else expected or "mixed_bfloat16")
    assert inside <= set(found) and "inner" in found
    assert model(tf.ones([1, 4, 3])).dtype == F16
    assert model.get_layer("attention")(*[tf.ones([1, 4, 3], BF16)] * 2).dtype == F32


def test_last_matching_override_counts():
    model = attention_model()
    overrides = {"block": "float32", "block/inner": "mixed_float16"}
    policy = get_policy(get_policy("mixed_bfloat16", {"e": "float32"}), overrides)
    assert [pattern for pattern, _ in policy.overrides] == ["e", "block", "block/inner"]
    get_policy("mixed_bfloat16", overrides).apply_overrides(nested_layers(model))
    found = policies(model)
    assert (found["block"], found["inner"]) == ("float32", "mixed_float16")
    assert found["head"] == "mixed_bfloat16"


def test_overrides_of_layers_that_are_not_built_go_by_name():
    layers = [keras.layers.Dense(2, name="one"), keras.layers.Dense(2, name="two")]
    get_policy("float32", {"tw": "mixed_float16"}).apply_overrides(iter(layers))
    assert [layer.dtype_policy.name for layer in layers] == ["float32", "mixed_float16"]


def test_wrong_overrides():
    layers = [keras.layers.Dense(2, name="one")]
    with pytest.raises(
        ConfigError, match=r"`overrides` \('three'\) .*no layer\.\n.*one"
    ):
        get_policy("float32", {"three": "mixed_float16"}).apply_overrides(layers)
    with pytest.raises(ConfigError, match="no regular expression"):
        get_policy("float32", {"(": "mixed_float16"})
    with pytest.raises(ConfigError, match="int8"):
        get_policy("float32", {"one": "int8"})
    with pytest.raises(ConfigError, match="none that Keras layers can"):
        get_policy("float32", {"one": "native"})


def test_weights_that_exist_keep_their_dtype():
    model = attention_model()
    policy = get_policy("mixed_bfloat16", {"head": "bfloat16"})
    with pytest.raises(ConfigError, match=r"\(bfloat16\): head/kernel is float32"):
        policy.apply_overrides(nested_layers(model))
    with pytest.raises(ConfigError, match="head/kernel is float32"):
        get_policy("bfloat16").wrap(model.get_layer("head"))


# wrap.

FINE = 1.0 + 2.0**-12  # a float32 number that bfloat16 rounds to 1


@pytest.mark.parametrize("outer", ["mixed_bfloat16", "mixed_float16", "float32"])
def test_a_wrapped_layer_computes_in_its_own_precision(outer):
    inputs = tf.constant([[FINE, 2.0]])
    kernel = np.array([[FINE], [1.0]], np.float32)
    with get_policy(outer).scope():
        island = get_policy("float32").wrap(keras.layers.Dense(1, name="island"))
        coarse = get_policy("mixed_bfloat16").wrap(keras.layers.Dense(1))
    for layer, expected in ((island, FINE**2 + 2.0), (coarse, 3.0)):
        layer(inputs)
        layer.layer.set_weights([kernel, np.zeros(1, np.float32)])
        output = layer(inputs)
        assert output.dtype == F32
        np.testing.assert_array_equal(output, np.array([[expected]], np.float32))
        assert [v.dtype for v in layer.trainable_variables] == ["float32"] * 2
    assert coarse.layer(inputs).dtype == BF16


def test_wrapped_output_and_weights_have_the_policys_dtypes():
    layer = get_policy("p=bf16,c=bf16,o=f64").wrap(keras.layers.Dense(1))
    outputs = layer(tf.ones([1, 2]))
    assert outputs.dtype == F64 and layer.weights[0].dtype == "bfloat16"
    plain = keras.layers.Dense(1)
    assert get_policy("native").wrap(plain) is plain


@keras.saving.register_keras_serializable(package="mpl_tests")
class Pair(keras.layers.Layer):
    """Two layers, made under the global policy, one of them in a list."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = keras.layers.Dense(3)
        self.supports_masking = True
        self.others = [keras.layers.Dense(3), {"deep": (keras.layers.Dense(3),)}]

    def build(self, input_shape):
        self.calls = self.add_weight(dtype="int32", trainable=False, name="calls")
        for layer in (self.first, self.others[0], self.others[1]["deep"][0]):
            layer.build(input_shape)

    def call(self, inputs):
        deep = self.others[1]["deep"][0]
        return deep(self.others[0](self.first(inputs)))


def wrapped_model(wrap):
    with get_policy("mixed_bfloat16").scope():
        ids = keras.Input([6], dtype="int32")
        x = keras.layers.Embedding(10, 3, mask_zero=True)(ids)
        # The default, orthogonal, has no bfloat16 kernel.
        lstm = keras.layers.LSTM(3, return_sequences=True, recurrent_initializer="ones")
        x = wrap(lstm)(x)
        x = wrap(keras.layers.MultiHeadAttention(2, 2))(x, x, use_causal_mask=True)
        x = wrap(keras.layers.Dropout(0.5))(x)
        x = wrap(keras.layers.BatchNormalization())(x)
        x = wrap(Pair())(x)
        return keras.Model(ids, keras.layers.Dense(2, dtype="float32")(x))


IDS = np.array([[1, 2, 3, 0, 0, 0], [4, 5, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6]])


def test_sublayers_follow_the_wrapped_layer():
    model = wrapped_model(get_policy("float32").wrap)
    outside = {"functional", "input_layer", "embedding"}
    for name, set_to in policies(model).items():
        inside = name.rstrip("_0123456789") not in outside
        if not name.startswith("dense"):  # the head, a Dense too, is float32 anyway
            assert set_to == ("float32" if inside else "mixed_bfloat16"), name
    pair = next(part for part in nested_layers(model) if isinstance(part, Pair))
    assert set(policies(pair).values()) == {"float32"} and len(policies(pair)) == 4


def test_wrapping_keeps_masks_training_and_weights():
    """In the model's own precision a wrapped layer is the layer itself."""
    policy = get_policy("params=float32,compute=bfloat16,output=bfloat16")
    wrapped, plain = wrapped_model(policy.wrap), wrapped_model(lambda layer: layer)
    plain.set_weights(wrapped.get_weights())
    assert [v.shape for v in wrapped.trainable_variables] == [
        v.shape for v in plain.trainable_variables
    ]
    np.testing.assert_array_equal(wrapped(IDS), plain(IDS))
    masked = wrapped(IDS, training=False)
    unmasked = wrapped.layers[2].layer(tf.ones([1, 6, 3]))
    assert getattr(unmasked, "_keras_mask", None) is None
    assert np.any(wrapped(IDS, training=True) != masked)  # dropout, batch statistics
    statistics = [v for v in wrapped.variables if v.path.endswith("moving_mean")]
    assert len(statistics) == 1 and np.any(statistics[0] != 0)


@pytest.mark.parametrize("output", ["float32", "bfloat16"])
def test_masks_outlive_the_cast_of_the_output(output):
    embedded = keras.layers.Embedding(10, 3, mask_zero=True)(IDS)
    policy = get_policy(f"c=bf16,o={output}")
    lstm = policy.wrap(keras.layers.LSTM(2, return_sequences=True))
    np.testing.assert_array_equal(lstm(embedded)._keras_mask, IDS != 0)
    pooled = policy.wrap(keras.layers.LSTM(2))(embedded)
    assert getattr(pooled, "_keras_mask", None) is None
    ids = policy.wrap(keras.layers.Embedding(10, 3, mask_zero=True))(IDS)
    np.testing.assert_array_equal(ids._keras_mask, IDS != 0)
    with pytest.warns(UserWarning, match="does not support masking"):
        output = policy.wrap(keras.layers.Conv1D(2, 1))(embedded)
    assert getattr(output, "_keras_mask", None) is None


def test_training_given_by_hand_reaches_the_layer():
    layer = get_policy("float32").wrap(keras.layers.Dropout(0.5))
    assert 0.0 in layer(tf.ones([20]), training=True).numpy()
    np.testing.assert_array_equal(layer(tf.ones([20]), training=False), np.ones(20))
    dense = get_policy("float32").wrap(keras.layers.Dense(1))  # takes no `training`
    assert dense(tf.ones([2, 2]), training=True).shape == [2, 1]


@pytest.mark.parametrize("name", ["float32", "mixed_float16", "bfloat16"])
def test_wrapped_layers_are_saved_and_reloaded(tmp_path, name):
    model = wrapped_model(get_policy(name).wrap)
    model.save(tmp_path / "model.keras")
    reloaded = keras.models.load_model(tmp_path / "model.keras")
    for ours, theirs in zip(model.weights, reloaded.weights, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    np.testing.assert_array_equal(model(IDS), reloaded(IDS))

    def by_class(model):
        # Keras does not save the policies of a model and its inputs.
        own = (keras.Model, keras.layers.InputLayer)
        parts = [p for p in nested_layers(model) if not isinstance(p, own)]
        return collections.Counter((type(p), p.dtype_policy.name) for p in parts)

    assert by_class(model) == by_class(reloaded)


def test_wrapped_layers_train_under_mirrored(strategy_of):
    strategy = strategy_of(2)
    with strategy.scope():
        layer = get_policy("mixed_bfloat16").wrap(keras.layers.Dense(1))
        layer.build([None, 2])
        layer(tf.ones([1, 2]))

    @tf.function
    def step():
        def replica_step():
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(layer(tf.ones([3, 2])))
            return tape.gradient(loss, [v.value for v in layer.trainable_variables])

        return strategy.run(replica_step)

    kernel, _ = step()
    for gradient in strategy.experimental_local_results(kernel):
        assert gradient.dtype == F32
        np.testing.assert_array_equal(gradient, [[3.0], [3.0]])
