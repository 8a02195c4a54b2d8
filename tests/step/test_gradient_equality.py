"""With bound parameters the gradient is the plain tape's, bit for bit in float32."""

import keras
import numpy as np
import pytest
import sonnet as snt
import tensorflow as tf

from mpl import errors
from mpl.precision import policy as policy_lib
from mpl.step import gradients as gradients_lib
from mpl.step import loss_scale_optimizer, master_weights, remat, state

layers = keras.layers
FEATURES = 6


def _functional():
    inputs = keras.Input((FEATURES,))
    shared = layers.Dense(FEATURES, activation="tanh",
                          kernel_regularizer=keras.regularizers.L2(0.01))
    x = shared(shared(inputs))
    x = layers.BatchNormalization()(x)
    x = layers.Dropout(0.3, seed=3)(x)
    frozen = layers.Dense(FEATURES)
    frozen.trainable = False
    x = layers.LayerNormalization()(frozen(x))
    return keras.Model(inputs, layers.Dense(3)(x))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.blocks = [layers.Dense(5, activation="gelu") for _ in range(2)]
        self.drop = layers.Dropout(0.5, seed=1)
        self.scale = self.add_weight(shape=(5,), initializer="ones", name="scale")
        self.head = layers.Dense(3, activity_regularizer=keras.regularizers.L2(0.1))

    def call(self, x, training=False):
        for block in self.blocks:
            x = self.drop(block(x), training=training)
        return self.head(x * self.scale)


def _subclassed():
    model = Subclassed()
    model(np.zeros((1, FEATURES), np.float32))
    return model


def _sequential():
    return keras.Sequential([
        keras.Input((FEATURES,)), layers.Dense(7), layers.BatchNormalization(),
        layers.ReLU(), layers.GaussianNoise(0.1, seed=2), layers.Dense(3)])


def _text():
    return keras.Sequential([
        keras.Input((FEATURES,)),
        layers.Lambda(lambda x: tf.cast(tf.abs(x) * 3, "int32")),
        layers.Embedding(20, 4), layers.LSTM(5, dropout=0.2, seed=5),
        layers.Dense(3, bias_regularizer=keras.regularizers.L1(0.1))])


class _Plain(tf.Module):
    """Variables as attributes, in lists and in dicts."""

    def __init__(self):
        super().__init__()
        rng = np.random.default_rng(0)

        def make(*shape):
            return tf.Variable(rng.normal(size=shape).astype(np.float32))

        self.first = make(FEATURES, 4)
        self.hidden = [make(4, 4), {"w": make(4, 4), "b": make(4)}]
        self.head = {"kernel": make(4, 3), "bias": (make(3),)}
        self.frozen = tf.Variable(tf.ones(4), trainable=False)
        self.calls = tf.Variable(0, trainable=False)

    def __call__(self, x, training=False):
        self.calls.assign_add(1)
        x = tf.tanh(x @ tf.cast(self.first, x.dtype)) * tf.cast(self.frozen, x.dtype)
        x = tf.tanh(x @ self.hidden[0]) @ self.hidden[1]["w"] + self.hidden[1]["b"]
        return x @ self.head["kernel"] + self.head["bias"][0]


class _Mixed(tf.Module):
    """A tf.Module that holds Keras layers beside variables of its own."""

    def __init__(self):
        super().__init__()
        self.towers = {"a": layers.Dense(4), "b": _sequential()}
        self.towers["a"].build((None, FEATURES))
        self.gain = tf.Variable(tf.ones(3) * 1.5)

    def __call__(self, x, training=False):
        y = self.towers["b"](x, training=training)
        return y * self.gain + tf.reduce_sum(self.towers["a"](x), 1, keepdims=True)


def _sonnet():
    class Net(snt.Module):
        def __init__(self):
            super().__init__()
            self.mlp = snt.nets.MLP([8, 5])
            self.norm = snt.LayerNorm(-1, True, True)
            self.head = snt.Linear(3)

        def __call__(self, x, training=False):
            return self.head(self.norm(self.mlp(x)))

    net = Net()
    net(tf.zeros((1, FEATURES)))
    return net


class Recomputed(Subclassed):
    """The same blocks, recomputed in the backward pass through mpl.remat."""

    def __init__(self, norm=layers.Identity):
        super().__init__()
        self.norm = norm()

    def call(self, x, training=False):
        part = remat.remat if getattr(self, "recompute", True) else (lambda f: f)
        for block in self.blocks:
            x = part(lambda y, b=block: self.drop(self.norm(b(y))))(x)
        return self.head(x * self.scale)


def _recomputed(norm=layers.Identity):
    model = Recomputed(norm)
    model(np.zeros((1, FEATURES), np.float32))
    return model


def _remat_layer():
    inputs = keras.Input((FEATURES,))
    block = keras.Sequential([
        keras.Input((FEATURES,)), layers.Dense(4, activation="relu"),
        layers.Dropout(0.5, seed=1), layers.Dense(FEATURES)])
    return keras.Model(inputs, layers.Dense(3)(remat.remat(block)(inputs)))


MODELS = {
    "functional": _functional, "subclassed": _subclassed, "sequential": _sequential,
    "text": _text, "module": _Plain, "mixed": _Mixed, "sonnet": _sonnet,
    "remat": _recomputed, "remat_layer": _remat_layer,
}


def _loss(model, x, y):
    logits = model(x, training=True)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)
    return state.LossOutput(losses, tf.ones_like(losses))


def _data(batch=16):
    rng = np.random.default_rng(1)
    return (tf.constant(rng.normal(size=(batch, FEATURES)).astype(np.float32)),
            tf.constant(rng.integers(0, 3, batch).astype(np.int32)))


def _pair(model, x, y):
    """Returns {name: (bound gradient, plain gradient)} and the two sets of state."""
    weights = master_weights.MasterWeights(model, "float32", sparse=None)
    optimizer = loss_scale_optimizer.LossScaleOptimizer(
        keras.optimizers.SGD(0.1), "none", weights)
    kept = [entry.value for entry in weights.state]
    before = [value.numpy() for value in kept]

    @tf.function
    def bound():
        params = weights.cast()
        with tf.GradientTape() as tape:
            tape.watch(params)
            with weights.bound(params) as forward:
                output = _loss(model, x, y)
            scaled = optimizer.scale_loss(output, forward)
        gradients = weights.gradients(tape, scaled, forward)
        return [part for bucket, gradient in zip(weights.buckets, gradients)
                for part in bucket.split(gradient)], forward.state

    def plain():
        values = [e.value for bucket in weights.buckets for e in bucket.entries]
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(_loss(model, x, y).per_example)
            if isinstance(model, keras.layers.Layer):
                # Keras lists what `add_loss` got first, then weight penalties.
                penalties = sum(e.regularizer is not None for e in weights.entries)
                for term in model.losses[:len(model.losses) - penalties]:
                    loss += term * len(y)
        return tape.gradient(loss, values)

    got, new_state = bound()
    for value, old in zip(kept, before):
        np.testing.assert_array_equal(value.numpy(), old)  # bound writes nothing
    want = tf.function(plain)()
    entries = [e for bucket in weights.buckets for e in bucket.entries]
    names = [entry.name for entry in entries]
    assert len(set(names)) == len(names)
    states = [(new, value.numpy()) for new, value in zip(new_state, kept)]
    return {n: (g, w) for n, g, w in zip(names, got, want, strict=True)}, states


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.usefixtures("no_grappler")
def test_gradients_and_state_equal_the_plain_tape(kind):
    model = MODELS[kind]()
    x, y = _data()
    pairs, states = _pair(model, x, y)
    for name, (got, want) in pairs.items():
        np.testing.assert_array_equal(got, tf.convert_to_tensor(want), err_msg=name)
        assert np.abs(got).max() > 0, name
    for got, want in states:
        if got is not None:
            np.testing.assert_array_equal(got, want)


def test_penalties_of_weights_are_added_once():
    model = _functional()
    weights = master_weights.MasterWeights(model, "float32")
    weights.build()
    for bucket in weights.buckets:
        zero = tf.zeros_like(bucket.variable)
        added = gradients_lib._add_regularizers(bucket, zero)
        for entry, part in zip(bucket.entries, bucket.split(added)):
            factor = 2 * 0.01 if entry.regularizer else 0.0
            np.testing.assert_allclose(part, factor * entry.value, rtol=1e-6)
    assert sum(entry.regularizer is not None for entry in weights.entries) == 1


@pytest.mark.usefixtures("no_grappler")
def test_remat_repeats_masks_and_equals_no_remat():
    """Batch statistics too: to rounding, as sums of three terms change their order."""
    x, y = _data()
    model = _recomputed(layers.BatchNormalization)
    start = [variable.numpy() for variable in model.non_trainable_variables]
    with_remat, states = _pair(model, x, y)
    for variable, value in zip(model.non_trainable_variables, start):
        variable.assign(value)
    model.recompute = False
    without, expected = _pair(model, x, y)
    for name in with_remat:
        np.testing.assert_allclose(
            with_remat[name][0], without[name][0], rtol=1e-4, atol=1e-5, err_msg=name)
    assert len(states) == 3  # mean, variance, seed
    for (got, _), (want, _) in zip(states, expected):
        np.testing.assert_array_equal(got, want)


def test_remat_holds_one_activation_less():
    """The forward pass's inner activations are not inputs of the backward pass."""
    block = keras.Sequential([keras.Input((FEATURES,)), layers.Dense(64, "tanh"),
                              layers.Dense(64, "tanh"), layers.Dense(3)])
    weights = master_weights.MasterWeights(block, "float32")
    weights.build()
    x, _ = _data()

    def tanh_gradients(call):
        @tf.function
        def run():
            params = weights.cast()
            with tf.GradientTape() as tape:
                tape.watch(params)
                with weights.bound(params):
                    loss = tf.reduce_sum(call(x))
            return tape.gradient(loss, params)
        graph = run.get_concrete_function().graph
        nodes = list(graph.as_graph_def().node)
        for function in graph.as_graph_def().library.function:
            nodes += function.node_def
        return sum(node.op == "Tanh" for node in nodes)

    assert tanh_gradients(remat.remat(block.__call__)) > tanh_gradients(block.__call__)


def test_remat_refuses_add_loss():
    layer = layers.Dense(3, activity_regularizer=keras.regularizers.L2(1.0))
    model = keras.Sequential([keras.Input((FEATURES,)), layer])
    weights = master_weights.MasterWeights(model, "float32")
    weights.build()
    with pytest.raises(errors.ConfigError, match="`add_loss` inside `mpl.remat`"):
        with weights.bound(weights.cast()):
            remat.remat(model.__call__)(_data()[0])


def _refused(make_model, call=None, policy="float32"):
    model = make_model()
    weights = master_weights.MasterWeights(model, policy)
    optimizer = loss_scale_optimizer.LossScaleOptimizer(
        keras.optimizers.SGD(0.1), "none", weights)

    @tf.function
    def run():
        params = weights.cast()
        with tf.GradientTape() as tape:
            tape.watch(params)
            with weights.bound(params) as forward:
                output = (call or _loss)(model, *_data())
            scaled = optimizer.scale_loss(output, forward)
        return weights.gradients(tape, scaled, forward)

    run()


def test_a_variable_without_gradient_is_named():
    class Unused(_Plain):
        def __init__(self):
            super().__init__()
            self.forgotten = tf.Variable(1.0)

    with pytest.raises(errors.ConfigError, match="'forgotten' has no gradient"):
        _refused(Unused)


def test_a_trainable_variable_outside_the_model_is_named():
    stranger = tf.Variable(2.0, name="stranger")
    with pytest.raises(errors.ConfigError, match="'stranger:0', a trainable variable"):
        _refused(_sequential, lambda model, x, y: state.LossOutput(
            _loss(model, x, y).per_example * stranger, tf.ones(len(y))))


def test_unseeded_random_is_named():
    class Noisy(layers.Layer):
        def call(self, x):
            return x + keras.random.normal((FEATURES,))

    with pytest.raises(errors.ConfigError, match="(?s)Noisy.*seed.*SeedGenerator"):
        _refused(lambda: keras.Sequential(
            [keras.Input((FEATURES,)), Noisy(), layers.Dense(3)]))


def test_a_metric_written_in_the_forward_pass_is_named():
    mean = keras.metrics.Mean("probe")

    def loss(model, x, y):
        mean.update_state(x)
        return _loss(model, x, y)

    with pytest.raises(errors.ConfigError, match="(?s)probe.*LossOutput.outputs"):
        _refused(_sequential, loss)


def test_state_written_in_a_while_loop_is_named():
    class Looping(layers.Layer):
        def __init__(self):
            super().__init__()
            self.norm = layers.BatchNormalization()

        def build(self, shape):
            self.norm.build(shape)

        def call(self, x, training=None):
            return tf.while_loop(lambda i, _: i < 2, lambda i, y: (
                i + 1, self.norm(y, training=True)), (0, x))[1]

    with pytest.raises(errors.ConfigError, match="inside a tf.while"):
        _refused(lambda: keras.Sequential(
            [keras.Input((FEATURES,)), Looping(), layers.Dense(3)]))


def test_sixteen_bit_logits_and_scalar_losses_are_refused():
    with pytest.raises(errors.ConfigError, match="(?s)bfloat16.*dtype='float32'"):
        _refused(_bfloat16_sequential, policy="mixed_bfloat16",
                 call=lambda model, x, y: state.LossOutput(
                     keras.losses.sparse_categorical_crossentropy(
                         y, model(x), from_logits=True), tf.ones(len(y))))
    with pytest.raises(errors.ConfigError, match="scalar"):
        _refused(_sequential, lambda model, x, y: state.LossOutput(
            tf.reduce_mean(_loss(model, x, y).per_example), 1.0))
    with pytest.raises(errors.ConfigError, match="(?s)None.*batch..weight"):
        _refused(_sequential, lambda model, x, y: _loss(model, x, y)._replace(
            weights=None))
    with pytest.raises(errors.ConfigError, match="must be an mpl.LossOutput"):
        _refused(_sequential, lambda model, x, y: _loss(model, x, y).per_example)


def _bfloat16_sequential():
    with policy_lib.get_policy("mixed_bfloat16").scope():
        return _sequential()


def test_freezing_needs_a_rebuild_which_keeps_slots():
    model = _functional()
    weights = master_weights.MasterWeights(model, "float32", pack_below=60)
    optimizer = loss_scale_optimizer.LossScaleOptimizer(
        keras.optimizers.Adam(0.1), "none", weights)
    kept = weights.entries[0].key.replace("/", "|")
    slots = {key: value.numpy() + 1 for key, value in optimizer.export_slots().items()}
    optimizer._import(slots)
    model.layers[-1].trainable = False
    with pytest.raises(errors.ConfigError, match="rebuild"):
        with weights.bound(weights.cast()):
            pass
    weights.rebuild()
    assert len(weights.entries) == len(model.trainable_variables)
    after = optimizer.export_slots()
    np.testing.assert_array_equal(after[f"momentum|{kept}"], slots[f"momentum|{kept}"])
    with weights.bound(weights.cast()):
        pass


def test_replicas_draw_different_masks(strategy_of):
    strategy = strategy_of(2)
    with strategy.scope():
        model = keras.Sequential([keras.Input((64,)), layers.Dense(64),
                                  layers.Dropout(0.5, seed=3)])
        weights = master_weights.MasterWeights(model, "float32")
        weights.build()

    @tf.function
    def run():
        def replica_step():
            with weights.bound(weights.cast()) as forward:
                dropped = model(tf.ones((1, 64)), training=True)
            return tf.equal(dropped, 0.0), forward.state[0]
        return strategy.run(replica_step)

    masks, seeds = run()
    first, second = strategy.experimental_local_results(masks)
    assert (first.numpy() != second.numpy()).any()
    one, other = strategy.experimental_local_results(seeds)
    np.testing.assert_array_equal(one, other)  # advanced alike


def test_a_collective_while_a_module_is_lent_is_named(strategy_of):
    strategy = strategy_of(2)
    with strategy.scope():
        model = _Plain()
        weights = master_weights.MasterWeights(model, "float32")
        weights.build()
    originals = dict(vars(model))

    def replica_step():
        with weights.bound(weights.cast()):
            total = tf.reduce_sum(model(tf.ones((2, FEATURES))))
            return tf.distribute.get_replica_context().all_reduce("SUM", total)

    with pytest.raises(errors.ConfigError, match="all_reduce in replica_step"):
        tf.function(lambda: strategy.run(replica_step))()
    for name, value in originals.items():
        assert vars(model)[name] is value


@pytest.mark.parametrize("pack_below", [0, 2**18])
def test_all_that_reads_the_params_counts(pack_below):
    """Two forward passes in one step, and a penalty on the params themselves."""
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, use_bias=False)])
    kernel = model.layers[0].kernel.numpy()
    weights = master_weights.MasterWeights(model, "float32", pack_below=pack_below)
    optimizer = loss_scale_optimizer.LossScaleOptimizer(
        keras.optimizers.SGD(0.1), "none", weights)
    x = tf.ones((2, 4))

    def output():
        return state.LossOutput(tf.reduce_sum(model(x), -1), tf.ones([2]))

    @tf.function
    def step():
        params = weights.cast()
        with tf.GradientTape() as tape:
            tape.watch(params)
            with weights.bound(params) as first:
                scaled = optimizer.scale_loss(output(), first)
            with weights.bound(params) as second:
                scaled += 2.0 * optimizer.scale_loss(output(), second)
            scaled += sum(tf.reduce_sum(tf.square(param)) for param in params)
        return weights.gradients(tape, scaled, second)

    bucket, = weights.buckets
    gradient, = bucket.split(step()[0])
    np.testing.assert_allclose(gradient, 3 * 2.0 + 2 * kernel, rtol=1e-6)
