"""The inner optimizer's rule, packed or not, gives Keras's own weights."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import mpl
from mpl import errors
from mpl.step import loss_scale_optimizer, master_weights, state
import small_models as models

pytestmark = pytest.mark.slow  # whole trainings, many of them

layers = keras.layers
optimizers = keras.optimizers
STEPS = 20
PACK_BELOW = 2048  # the wide kernel of `_model` stays by itself, the rest is packed

ELEMENTWISE = {
    "sgd": lambda: optimizers.SGD(0.1, weight_decay=0.01),
    "momentum": lambda: optimizers.SGD(0.1, momentum=0.9),
    "nesterov": lambda: optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    "rmsprop": lambda: optimizers.RMSprop(),
    "rmsprop_centered": lambda: optimizers.RMSprop(centered=True),
    "rmsprop_momentum": lambda: optimizers.RMSprop(momentum=0.9),
    "adam": lambda: optimizers.Adam(),
    "amsgrad": lambda: optimizers.Adam(amsgrad=True),
    "adamw": lambda: optimizers.AdamW(weight_decay=0.1),
    "adamax": lambda: optimizers.Adamax(),
    "nadam": lambda: optimizers.Nadam(),
    "adagrad": lambda: optimizers.Adagrad(),
    "adadelta": lambda: optimizers.Adadelta(),
    "lion": lambda: optimizers.Lion(),
    "ftrl": lambda: optimizers.Ftrl(
        0.1, l1_regularization_strength=0.01, l2_regularization_strength=0.01),
}
BY_SHAPE = {
    "lamb": lambda: optimizers.Lamb(weight_decay=0.1),
    "adafactor": lambda: optimizers.Adafactor(),
    "muon": lambda: optimizers.Muon(0.01, weight_decay=0.1, adam_weight_decay=0.2),
    "schedule_free": lambda: optimizers.ScheduleFreeAdamW(weight_decay=0.1),
}


def _model(constraint=None):
    keras.utils.set_random_seed(0)
    return keras.Sequential([
        keras.Input((6, 6, 2)), layers.Conv2D(4, 3, name="conv"), layers.Flatten(),
        layers.Dense(16, kernel_constraint=constraint, name="wide"),
        layers.LayerNormalization(name="norm"), layers.Dense(3, name="head")])


def _gradients(model, steps=STEPS):
    """Gradients of many sizes, the same for every call."""
    rng = np.random.default_rng(0)
    return [
        [tf.constant(rng.normal(size=v.shape) * 10 ** rng.uniform(-4, 1), tf.float32)
         for v in model.trainable_variables] for _ in range(steps)]


def _mpl(model, inner, gradients, *, pack_below=PACK_BELOW, scales=None, **kwargs):
    """Trains with mpl on a loss whose gradients are `gradients`.

    Args:
      scales: factor on each step's gradients; inf makes a step that is skipped.
    """
    settings = {key: kwargs.pop(key) for key in ("clip_norm", "ema_decay")
                if key in kwargs}
    weights = master_weights.MasterWeights(
        model, "float32", pack_below=pack_below, **kwargs)
    optimizer = loss_scale_optimizer.LossScaleOptimizer(
        inner, "none", weights, **settings)

    @tf.function
    def step(gradients, scale):
        params = weights.cast()
        with tf.GradientTape() as tape:
            tape.watch(params)
            with weights.bound(params) as forward:
                loss = scale * tf.add_n([
                    tf.reduce_sum(variable.value * gradient) for variable, gradient
                    in zip(model.trainable_variables, gradients)])
            output = state.LossOutput(loss[tf.newaxis], [1.0])
            scaled = optimizer.scale_loss(output, forward)
        optimizer.apply(weights.gradients(tape, scaled, forward), forward)

    for number, gradient in enumerate(gradients):
        step(gradient, tf.constant(scales[number] if scales else 1.0))
    weights.publish()
    return optimizer


def _keras(model, inner, gradients, variables=None):
    """Trains with the Keras optimizer alone."""
    variables = model.trainable_variables if variables is None else variables
    wanted = [[gradient for gradient, variable
               in zip(step, model.trainable_variables)
               if any(variable is one for one in variables)] for step in gradients]
    inner.build(variables)
    step = tf.function(lambda gradients: inner.apply(gradients, variables))
    for gradient in wanted:
        step(gradient)


def _assert_same(model, expected):
    for got, want in zip(model.trainable_variables, expected.trainable_variables):
        np.testing.assert_array_equal(got.numpy(), want.numpy(), err_msg=got.path)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_rules_equal_keras_bit_for_bit(name, request):
    """In graphs as written; Ftrl's after Grappler made sqrt(x) of its pow(x, 0.5).

    TensorFlow's pow and rsqrt round differently in whole vector registers and in the
    last elements of an array, and packing moves elements between the two.
    """
    if name != "ftrl":
        request.getfixturevalue("no_grappler")
    model, expected = _model(), _model()
    gradients = _gradients(model)
    optimizer = _mpl(model, ELEMENTWISE[name](), gradients)
    packed = [len(bucket.entries) for bucket in optimizer.weights.buckets]
    assert sorted(packed) == [1, 7]
    _keras(expected, ELEMENTWISE[name](), gradients)
    _assert_same(model, expected)


@pytest.mark.parametrize("name", ["rmsprop_centered", "adagrad", "adadelta"])
def test_grappler_changes_packed_weights_by_rounding(name):
    """It writes x / sqrt(y) as x × rsqrt(y), see above. Seen: 2e-9."""
    model, expected, unpacked = _model(), _model(), _model()
    gradients = _gradients(model)
    _keras(expected, ELEMENTWISE[name](), gradients)
    _mpl(model, ELEMENTWISE[name](), gradients)
    for got, want in zip(model.trainable_variables, expected.trainable_variables):
        np.testing.assert_allclose(got.numpy(), want.numpy(), rtol=1e-6, atol=1e-8)
    _mpl(unpacked, ELEMENTWISE[name](), gradients, pack_below=0)
    _assert_same(unpacked, expected)


@pytest.mark.parametrize("name", BY_SHAPE)
def test_rules_that_look_at_shapes_equal_keras_bit_for_bit(name):
    model, expected = _model(), _model()
    gradients = _gradients(model)
    optimizer = _mpl(model, BY_SHAPE[name](), gradients)
    assert all(not bucket.kind.packed for bucket in optimizer.weights.buckets)
    _keras(expected, BY_SHAPE[name](), gradients)
    _assert_same(model, expected)


def test_a_subclass_of_an_elementwise_rule_is_not_packed():
    class Adam(optimizers.Adam):
        def update_step(self, gradient, variable, learning_rate):
            size = tf.cast(tf.size(variable), tf.float32)
            super().update_step(gradient, variable, learning_rate / size)

    model, expected = _model(), _model()
    gradients = _gradients(model, 3)
    _mpl(model, Adam(), gradients)
    _keras(expected, Adam(), gradients)
    _assert_same(model, expected)


def test_no_decay_equals_keras_exclusions():
    model, expected = _model(), _model()
    gradients = _gradients(model)
    optimizer = _mpl(model, optimizers.AdamW(weight_decay=0.1), gradients,
                     no_decay=["bias$", "norm/"])
    assert sorted(bucket.kind.decay for bucket in optimizer.weights.buckets) == [
        False, True, True]
    inner = optimizers.AdamW(weight_decay=0.1)
    inner.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    _keras(expected, inner, gradients)
    _assert_same(model, expected)


def test_multipliers_equal_one_keras_optimizer_a_group():
    model, expected = _model(), _model()
    gradients = _gradients(model)
    # Powers of two: Keras rounds rate × factor once, in Python.
    _mpl(model, optimizers.AdamW(0.01, weight_decay=0.1), gradients,
         lr_multipliers={"^sequential.*/head|^head/": 0.25, "wide/kernel": 2.0})
    groups = {0.25: [], 2.0: [], 1.0: []}
    for variable in expected.trainable_variables:
        factor = 0.25 if "head/" in variable.path else (
            2.0 if "wide/kernel" in variable.path else 1.0)
        groups[factor].append(variable)
    assert [len(group) for group in groups.values()] == [2, 1, 5]
    for factor, group in groups.items():
        _keras(expected, optimizers.AdamW(0.01 * factor, weight_decay=0.1), gradients,
               group)
    _assert_same(model, expected)


def test_frozen_layers_stay_and_others_equal_keras():
    model, expected = _model(), _model()
    for one in (model, expected):
        one.get_layer("wide").trainable = False
    start = model.get_layer("wide").get_weights()
    gradients = _gradients(model)
    _mpl(model, optimizers.Adam(), gradients)
    _keras(expected, optimizers.Adam(), gradients)
    _assert_same(model, expected)
    for old, new in zip(start, model.get_layer("wide").get_weights()):
        np.testing.assert_array_equal(old, new)


def test_constraints_hold_as_in_keras():
    constraint = keras.constraints.MaxNorm(0.5)
    model, expected = _model(constraint), _model(constraint)
    gradients = _gradients(model)
    optimizer = _mpl(model, optimizers.SGD(0.1), gradients, pack_below=10**6)
    _keras(expected, optimizers.SGD(0.1), gradients)
    _assert_same(model, expected)
    norms = np.linalg.norm(model.get_layer("wide").kernel.numpy(), axis=0)
    assert norms.max() <= 0.5 + 1e-6
    assert int(optimizer.applied_steps) == STEPS


def test_a_schedule_follows_applied_steps():
    """Skipped steps leave the schedule where it was, in weights and in the report."""
    schedule = optimizers.schedules.PolynomialDecay(0.5, STEPS, 0.01)
    model, expected = _model(), _model()
    gradients = _gradients(model)
    scales = [np.inf if number % 3 == 1 else 1.0 for number in range(STEPS)]
    optimizer = _mpl(model, optimizers.Adam(schedule), gradients, scales=scales)
    kept = [gradient for gradient, scale in zip(gradients, scales) if scale == 1.0]
    _keras(expected, optimizers.Adam(schedule), kept)
    _assert_same(model, expected)
    assert int(optimizer.applied_steps) == len(kept)
    assert int(optimizer.skipped_steps) == STEPS - len(kept)
    np.testing.assert_array_equal(optimizer.learning_rate, schedule(len(kept)))


def test_the_average_equals_a_numpy_oracle():
    model = _model()
    gradients = _gradients(model, 6)
    average = {v.path: v.numpy() for v in model.trainable_variables}
    weights = {v.path: v.numpy() for v in model.trainable_variables}
    for number, step in enumerate(gradients):
        if number == 3:
            continue  # skipped below
        for variable, gradient in zip(model.trainable_variables, step):
            path = variable.path
            weights[path] = weights[path] - np.float32(0.1) * gradient.numpy()
            average[path] = 0.9 * average[path] + 0.1 * weights[path]
    optimizer = _mpl(model, optimizers.SGD(0.1), gradients, ema_decay=0.9,
                     scales=[1.0, 1.0, 1.0, np.inf, 1.0, 1.0])
    for bucket, packed in zip(optimizer.weights.buckets, optimizer.averages):
        for entry, value in zip(bucket.entries, bucket.split(packed)):
            np.testing.assert_allclose(
                value, average[entry.name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip_norm", [0.5, 1e6])
def test_clipping_equals_clip_by_global_norm(clip_norm):
    model, expected = _model(), _model()
    gradients = _gradients(model, 5)
    optimizer = _mpl(model, optimizers.SGD(0.1), gradients, clip_norm=clip_norm)
    clipped = [tf.clip_by_global_norm(step, clip_norm)[0] for step in gradients]
    _keras(expected, optimizers.SGD(0.1), clipped)
    for got, want in zip(model.trainable_variables, expected.trainable_variables):
        np.testing.assert_allclose(got.numpy(), want.numpy(), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(
        optimizer.grad_norm, tf.linalg.global_norm(gradients[-1]), rtol=1e-6)


def _refused(inner, match):
    weights = master_weights.MasterWeights(_model(), "float32")
    with pytest.raises(errors.ConfigError, match=match):
        loss_scale_optimizer.LossScaleOptimizer(inner, "none", weights)


@pytest.mark.parametrize("setting, value, ours", [
    ("clipnorm", 1.0, "clip_norm of LossScaleOptimizer"),
    ("clipvalue", 1.0, "clip_norm of LossScaleOptimizer"),
    ("global_clipnorm", 1.0, "clip_norm of LossScaleOptimizer"),
    ("use_ema", True, "ema_decay of LossScaleOptimizer"),
    ("gradient_accumulation_steps", 2, "mpl.accumulate"),
    ("loss_scale_factor", 8.0, "loss_scale of LossScaleOptimizer"),
])
def test_settings_of_the_inner_optimizer_that_are_ours(setting, value, ours):
    _refused(optimizers.Adam(**{setting: value}), f"(?s)`{setting}`.*{ours}")


def test_exclusions_of_the_inner_optimizer_are_refused():
    for names in ({"var_names": ["bias"]}, {"var_list": [keras.Variable(1.0)]}):
        inner = optimizers.AdamW()
        inner.exclude_from_weight_decay(**names)
        _refused(inner, "(?s)exclude_from_weight_decay.*`no_decay`")


@pytest.mark.parametrize("method", [
    "apply", "_backend_update_step", "_backend_apply_gradients", "_apply_weight_decay"])
def test_rules_outside_of_update_step_are_refused(method):
    mine = type("Mine", (optimizers.Adam,), {method: lambda self, *args: None})
    _refused(mine(), f"Mine overrides `{method}`")


def test_what_is_no_inner_optimizer_is_refused():
    _refused("adam", "str; it must be a Keras optimizer")
    _refused(optimizers.LossScaleOptimizer(optimizers.SGD()), "scale a second time")
    built = optimizers.SGD()
    built.build([keras.Variable(1.0)])
    _refused(built, "was built before")


@pytest.mark.parametrize("make", [optimizers.Adam, optimizers.AdamW, optimizers.Lamb])
def test_masters_that_would_never_move_are_refused(make):
    with mpl.get_policy("bfloat16").scope():
        model = _model()
    weights = master_weights.MasterWeights(model, "bfloat16")
    optimizer = loss_scale_optimizer.LossScaleOptimizer
    with pytest.raises(errors.ConfigError, match=r"`beta_2` \(0.999\) .* is 1 in the"):
        optimizer(make(), "none", weights)
    assert optimizer(make(beta_2=0.99), "none", weights).buckets


def test_an_inner_optimizer_of_another_strategy_is_refused(strategy_of):
    inner = optimizers.SGD()
    with pytest.raises(errors.ConfigError, match="(?s)outside the current.*scope"):
        models.Step(strategy_of(2), inner=lambda: inner)


@pytest.mark.parametrize("arguments, match", [
    ({"clip_norm": 0.0}, "`clip_norm` .0.0. must be positive"),
    ({"clip_norm": np.inf}, "`clip_norm` .inf. must be positive"),
    ({"ema_decay": 1.0}, "`ema_decay` .1.0. must lie between"),
    ({"nominal_weight": 0.0}, "`nominal_weight` .0.0. must be positive"),
])
def test_wrong_numbers_are_refused(arguments, match):
    with pytest.raises(errors.ConfigError, match=match):
        loss_scale_optimizer.LossScaleOptimizer(optimizers.SGD(), **arguments)


@pytest.mark.parametrize("argument", ["no_decay", "lr_multipliers", "sparse"])
def test_a_pattern_that_matches_nothing_is_refused(argument):
    pattern = {"biass": 2.0} if argument == "lr_multipliers" else ["biass"]
    with pytest.raises(errors.ConfigError, match=f"`{argument}`.*'biass'"):
        master_weights.MasterWeights(_model(), "float32", **{argument: pattern})


def test_apply_gradients_equals_keras_on_ordinary_variables():
    """The plain form adds no penalties: whoever writes the loss has done so."""
    def make():
        keras.utils.set_random_seed(0)
        return keras.Sequential([keras.Input((4,)), layers.Dense(
            5, kernel_regularizer=keras.regularizers.L2(0.1),
            bias_constraint=keras.constraints.NonNeg())])

    model, expected = make(), make()
    gradients = _gradients(model, 5)
    optimizer = loss_scale_optimizer.LossScaleOptimizer(
        optimizers.AdamW(weight_decay=0.1), 8.0)
    for step in gradients:
        optimizer.apply_gradients(
            (gradient * 8.0, v) for gradient, v in zip(step, model.trainable_variables))
    _keras(expected, optimizers.AdamW(weight_decay=0.1), gradients)
    _assert_same(model, expected)


def test_apply_gradients_refuses_other_variables():
    optimizer = loss_scale_optimizer.LossScaleOptimizer(optimizers.SGD())
    one, other = tf.Variable(1.0, name="one"), tf.Variable(1.0, name="other")
    with pytest.raises(errors.ConfigError, match="'one' has no gradient"):
        optimizer.apply_gradients([(None, one)])
    optimizer.apply_gradients([(tf.constant(1.0), one)])
    with pytest.raises(errors.ConfigError, match="other variables"):
        optimizer.apply_gradients([(tf.constant(1.0), other)])


def test_replicas_update_alike(strategy_of):
    """Nadam's product outside of `update_step`, under two replicas."""
    step = models.Step(strategy_of(2), inner=ELEMENTWISE["nadam"])
    reference = models.Step(strategy_of(1), inner=ELEMENTWISE["nadam"])
    for _ in range(3):
        step(models.image_batch()), reference(models.image_batch())
    product, expected = (
        {v.name: float(v.numpy()) for v in one.optimizer.inner.variables
         if v.shape == () and "variable" in v.name} for one in (step, reference))
    assert list(product.values()) == list(expected.values()) != [1.0]
