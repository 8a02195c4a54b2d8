"""What mpl assumes of Keras and TensorFlow beyond their documentation.

A failure here means that a library changed under binding.py, slots.py or sparse.py;
the test says which assumption to look after.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

layers = keras.layers
optimizers = keras.optimizers


def _nested():
    inner = keras.Sequential([keras.Input((3,)), layers.Dense(3), layers.Dropout(0.1)])
    model = keras.Sequential(
        [keras.Input((3,)), inner, layers.BatchNormalization(), layers.Dense(2)])
    return model, inner


def test_flatten_layers_lists_itself_and_nested_layers_once():
    model, inner = _nested()
    found = model._flatten_layers()
    assert len({id(layer) for layer in found}) == len(found)
    for layer in (model, inner, *inner.layers, *model.layers):
        assert any(layer is one for one in found)


def test_trainable_variables_of_a_layer_are_its_own_even_when_frozen():
    model, inner = _nested()
    dense, norm = inner.layers[0], model.layers[1]
    for trainable in (True, False):
        model.trainable = trainable
        assert [v.name for v in dense._trainable_variables] == ["kernel", "bias"]
        assert [v.name for v in norm._trainable_variables] == ["gamma", "beta"]
        assert model._trainable_variables == []
    assert model.trainable_variables == []


def test_autocast_tells_islands():
    model, _ = _nested()
    norm, dense = model.layers[1:]
    assert [v._autocast for v in norm.variables] == [False] * 4
    assert [v._autocast for v in dense.variables] == [True] * 2
    embedding = layers.Embedding(3, 2)
    embedding.build()
    assert not embedding.autocast and dense.autocast


def test_seeds_are_named_so():
    model, inner = _nested()
    seed, = inner.layers[1].variables
    assert seed.name == "seed_generator_state"
    assert seed.shape == (2,) and tf.as_dtype(seed.dtype).is_integer
    assert any(seed is variable for variable in model.variables)
    assert not any(seed is variable for variable in model.trainable_variables)


@pytest.mark.parametrize("name", ["regularizer", "constraint"])
def test_variables_carry_what_add_weight_was_given(name):
    given = {"regularizer": keras.regularizers.L2(), "constraint":
             keras.constraints.NonNeg()}[name]
    layer = layers.Dense(2, **{f"kernel_{name}": given})
    layer.build((None, 3))
    assert getattr(layer.kernel, name) is given
    assert getattr(layer.bias, name) is None


def test_a_stateless_scope_reads_and_keeps_what_it_is_given():
    """Unconverted, through its mapping; losses stay in one list."""
    layer = layers.Dense(2, activity_regularizer="l2")
    layer.build((None, 3))
    scope = keras.StatelessScope(collect_losses=True)
    losses = scope.losses
    value = tf.zeros(layer.kernel.shape, tf.bfloat16)
    scope.state_mapping[id(layer.kernel)] = value
    with scope:
        assert layer.kernel.value is value
        layer(tf.ones((1, 3)))
        layer.bias.assign(tf.ones(2))
        assert scope.losses is losses and len(losses) == 1
    np.testing.assert_array_equal(scope.get_current_value(layer.bias), [1.0, 1.0])
    assert layer.bias.numpy().sum() == 0.0
    assert scope.get_current_value(layers.Dense(1)) is None


def test_a_layer_runs_the_call_of_its_instance():
    layer = layers.Embedding(3, 2)
    layer.build()
    vars(layer)["call"] = lambda ids: tf.zeros((1,))
    assert layer(np.array([1])).shape == (1,)
    del vars(layer)["call"]
    assert layer(np.array([1])).shape == (1, 2)


def test_nadam_keeps_its_product_outside_of_update_step():
    inner = optimizers.Nadam()
    variable = keras.Variable([1.0])
    inner.build([variable])
    assert float(inner._u_product) == 1.0
    inner.update_step(tf.ones(1), variable.value, 0.1)
    assert float(inner._u_product) == 1.0
    inner.apply([tf.ones(1)], [variable])
    np.testing.assert_allclose(float(inner._u_product), 0.9 * (1 - 0.5 * 0.96))
    assert any(inner._u_product is v for v in inner.variables)


def test_exclusions_from_decay_are_kept_under_these_names():
    inner = optimizers.AdamW()
    names = ("_exclude_from_weight_decay", "_exclude_from_weight_decay_pattern")
    assert not any(getattr(inner, name, None) for name in names)
    inner.exclude_from_weight_decay(var_names=["bias"])
    assert inner._exclude_from_weight_decay_pattern is not None
    inner.exclude_from_weight_decay(var_list=[keras.Variable(1.0)])
    assert len(inner._exclude_from_weight_decay) == 1


@pytest.mark.parametrize("method", [
    "apply", "_backend_update_step", "_backend_apply_gradients", "_apply_weight_decay"])
def test_optimizers_that_override_a_step_are_the_known_ones(method):
    known = {"Nadam": ["_backend_update_step"], "Muon": ["_apply_weight_decay"],
             "LossScaleOptimizer": ["apply"], "MultiOptimizer": ["apply"]}
    base = optimizers.Optimizer
    assert callable(getattr(base, method))
    kinds = {name: kind for name, kind in vars(optimizers).items()
             if isinstance(kind, type) and issubclass(kind, base) and kind is not base}
    overriding = {
        name for name, kind in kinds.items()
        if any(method in vars(one) for one in kind.__mro__[:kind.__mro__.index(base)])}
    assert overriding == {name for name, methods in known.items() if method in methods}


@pytest.mark.parametrize("name, slots", [
    ("SGD", []), ("Adam", ["momentum", "velocity"]), ("Adagrad", ["accumulator"])])
def test_build_asks_for_slots_by_these_names(name, slots):
    """The rules for rows and the checkpoint know slots by them."""
    inner = getattr(optimizers, name)()
    asked, create = [], inner.add_variable_from_reference

    def recorded(reference_variable, name=None, initializer="zeros"):
        asked.append(name)
        return create(reference_variable, name=name, initializer=initializer)

    vars(inner)["add_variable_from_reference"] = recorded
    inner.build([tf.Variable([1.0])])
    assert asked == slots


def test_muon_has_a_velocity_exactly_where_adam_rules():
    inner = optimizers.Muon()
    variables = [keras.Variable(tf.ones(shape), name=name) for name, shape in (
        ("kernel", (2, 2)), ("bias", (2,)), ("embeddings", (2, 2)))]
    inner.build(variables)
    assert [v is not None for v in inner.adam_velocities] == [False, True, True]


def test_a_mirrored_variable_gives_its_handle_to_replicas_and_updates(strategy_of):
    """`tf.gather` would read the whole variable (see sparse.py)."""
    strategy = strategy_of(2)
    with strategy.scope():
        variable = tf.Variable(tf.ones((4, 2)))

    def gather(variable):
        return tf.raw_ops.ResourceGather(
            resource=variable.handle, indices=[1], dtype=tf.float32)

    @tf.function
    def run():
        updated = strategy.extended.update(
            variable, lambda one: gather(variable), group=False)
        return strategy.run(lambda: gather(variable)), updated

    copies = tf.nest.flatten(run(), expand_composites=True)
    assert len(copies) == 4
    for copy in copies:
        np.testing.assert_array_equal(copy, [[1.0, 1.0]])


def test_trackables_have_the_hooks_of_checkpoints():
    module = tf.Module()
    for hook in ("_trackable_children", "_serialize_to_tensors",
                 "_restore_from_tensors"):
        assert callable(getattr(module, hook))


def test_modules_keep_their_bookkeeping_under_known_prefixes():
    """binding.py leaves these attributes out of its walk."""
    module = tf.Module(name="m")
    module.kernel = tf.Variable(1.0)
    module.parts = [tf.Variable(2.0), {"b": tf.Variable(3.0)}]
    others = set(vars(module)) - {"kernel", "parts"}
    for name in others:
        if not name.startswith(("_self_", "_tf_", "_obj_")):
            assert not isinstance(vars(module)[name], (tf.Variable, list, dict)), name
