"""What a layer holds in float32 never passes through the compute dtype."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from mpl.precision import policy as policy_lib
from mpl.step import binding, loss_scale_optimizer, master_weights, state

layers = keras.layers
WIDTH = 16
POLICIES = ("mixed_bfloat16", "mixed_float16")


class Scale(layers.Layer):
    """One weight that asks not to be cast, and one that does not mind."""

    def build(self, shape):
        self.kept = self.add_weight(shape=(WIDTH,), name="kept", autocast=False)
        self.free = self.add_weight(shape=(WIDTH,), name="free")

    def call(self, x):
        return x * tf.cast(self.kept, x.dtype) * self.free


class Tied(layers.Layer):
    """Reads another layer's kernel, which both then own."""

    def __init__(self, other, **kwargs):
        super().__init__(**kwargs)
        self.other, self.kernel = other, other.kernel

    def call(self, x):
        return x @ tf.transpose(tf.cast(self.kernel, x.dtype))


def _tied():
    dense = layers.Dense(WIDTH, dtype="float32", use_bias=False)
    dense.build((None, WIDTH))
    return [dense, Tied(dense, dtype="float32")]


# From a name to layers; the last is looked at.
ISLANDS = {
    "batch_norm": (lambda: [layers.BatchNormalization()],
                   ("gamma", "beta", "moving_mean", "moving_variance")),
    "layer_norm": (lambda: [layers.LayerNormalization()], ("gamma", "beta")),
    "autocast_false": (lambda: [layers.Dense(WIDTH, autocast=False)],
                       ("kernel", "bias")),
    "dtype_float32": (lambda: [layers.Dense(WIDTH, dtype="float32")],
                      ("kernel", "bias")),
    "weight": (lambda: [Scale()], ("kept",)),
    "override": (lambda: [layers.Dense(WIDTH, name="overridden")], ("kernel", "bias")),
    "tied": (_tied, ("kernel",)),
}


def _built(make_layers, policy):
    """Returns a model around some layers, with weights of all 24 bits."""
    overrides = {"overridden": "float32"}
    with policy_lib.get_policy(policy).scope():
        parts = make_layers()
        model = keras.Sequential([keras.Input((WIDTH,)), layers.Dense(WIDTH), *parts,
                                  layers.Dense(3, dtype="float32")])
    if any(layer.name == "overridden" for layer in parts):
        policy = policy_lib.get_policy(policy, overrides)
        policy.apply_overrides(binding.flatten_layers(model))
    rng = np.random.default_rng(0)
    for variable in model.weights:
        variable.assign(rng.uniform(1, 2, variable.shape).astype(np.float32))
    return model, parts[-1], policy


def _reads(model, layer, names, weights, inputs):
    """Returns what the layer's `call` gets for its weights, by name."""
    seen, call = {}, layer.call

    def looking(*args, **kwargs):
        for name in names:
            seen[name] = tf.convert_to_tensor(getattr(layer, name))
        return call(*args, **kwargs)

    layer.call = looking
    try:
        with weights.bound(weights.cast()):
            model(inputs, training=True)
    finally:
        layer.call = call
    return seen


@pytest.mark.parametrize("pack_below", [1, 10**6], ids=["large", "packed"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ISLANDS)
def test_islands_are_read_bit_for_bit(kind, policy, pack_below):
    make_layers, names = ISLANDS[kind]
    model, layer, policy = _built(make_layers, policy)
    weights = master_weights.MasterWeights(model, policy, pack_below=pack_below)
    weights.build()
    seen = _reads(model, layer, names, weights, tf.ones((4, WIDTH)))
    for name in names:
        exact = getattr(layer, name).numpy()
        compute = policy_lib.get_policy(policy).compute_dtype
        assert (tf.cast(tf.cast(exact, compute), tf.float32).numpy() != exact).any()
        assert seen[name].dtype == tf.float32
        np.testing.assert_array_equal(seen[name], exact)


@pytest.mark.parametrize("pack_below", [1, 10**6], ids=["large", "packed"])
@pytest.mark.parametrize("policy", POLICIES)
def test_other_weights_are_read_as_compute_copies(policy, pack_below):
    model, layer, _ = _built(lambda: [Scale()], policy)
    weights = master_weights.MasterWeights(model, policy, pack_below=pack_below)
    weights.build()
    compute = weights.policy.compute_dtype
    dense = model.layers[0]
    for part, name in ((layer, "free"), (dense, "kernel"), (dense, "bias")):
        seen = _reads(model, part, [name], weights, tf.ones((4, WIDTH)))[name]
        assert seen.dtype == compute
        np.testing.assert_array_equal(seen, tf.cast(getattr(part, name).value, compute))


def _embedding(policy, **kwargs):
    with policy_lib.get_policy(policy).scope():
        model = keras.Sequential([
            keras.Input((1,), dtype="int32"), layers.Embedding(8, 1, name="table")])
    model.layers[0].embeddings.assign(
        np.random.default_rng(0).uniform(1, 2, (8, 1)).astype(np.float32))
    return model, master_weights.MasterWeights(model, policy, **kwargs)


TABLES = {"packed": {}, "large": {"sparse": None, "pack_below": 1},
          "sparse": {"pack_below": 1}}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("policy", POLICIES)
def test_embeddings_are_read_bit_for_bit(policy, table):
    model, weights = _embedding(policy, **TABLES[table])
    weights.build()
    bucket, = weights.buckets
    assert bucket.kind.sparse is (table == "sparse")
    assert bucket.kind.compute == tf.float32
    param, = weights.cast()
    rows = tf.convert_to_tensor(bucket.split(param)[0])
    np.testing.assert_array_equal(rows, model.layers[0].embeddings.numpy())
    with weights.bound([param]):
        output = model(np.array([[5]]))
    assert output.dtype == weights.policy.compute_dtype


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_thousand_repeated_ids_are_summed_in_float32(policy, table):
    """Summed in bfloat16 the gradient would stop at 256, where 256 + 1 = 256."""
    model, weights = _embedding(policy, **TABLES[table])
    optimizer = loss_scale_optimizer.LossScaleOptimizer(
        keras.optimizers.SGD(1.0), "none", weights)

    @tf.function
    def step():
        params = weights.cast()
        with tf.GradientTape() as tape:
            tape.watch(params)
            with weights.bound(params) as forward:
                output = tf.cast(model(tf.fill((1000, 1), 5)), tf.float32)
            scaled = optimizer.scale_loss(
                state.LossOutput(
                    output[:, 0, 0], tf.ones_like(output[:, 0, 0])), forward)
        optimizer.apply(weights.gradients(tape, scaled, forward), forward)

    before = model.layers[0].embeddings.numpy()
    step()
    weights.publish()
    change = before - model.layers[0].embeddings.numpy()
    np.testing.assert_allclose(change[5], 1.0, rtol=1e-6)
    np.testing.assert_array_equal(np.delete(change, 5, 0), 0.0)


@pytest.mark.parametrize("pack_below", [1, 10**6], ids=["large", "packed"])
def test_islands_share_no_bucket_with_compute_copies(pack_below):
    model, _, policy = _built(lambda: [layers.LayerNormalization()], "mixed_bfloat16")
    weights = master_weights.MasterWeights(model, policy, pack_below=pack_below)
    weights.build()
    for bucket in weights.buckets:
        islands = {entry.name.rsplit("/", 1)[-1] in ("gamma", "beta")
                   or entry.name.startswith(model.layers[-1].path)
                   for entry in bucket.entries}
        assert islands == {bucket.kind.compute == tf.float32}
