"""Loss scales: the rule against its oracles, in every way that a step can run it."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from mpl.errors import ConfigError
from mpl.precision import (
    DynamicLossScale,
    NoLossScale,
    StaticLossScale,
    get_loss_scale,
    get_policy,
)

NUM_SEQUENCES, NUM_STEPS = 100_000, 64


def random_flags(shape, seed=0):
    """[steps, sequences] flags; each sequence has its own rate of overflows."""
    random = np.random.default_rng(seed)
    rates = random.choice([0.0, 0.02, 0.2, 0.5, 0.9, 1.0], shape[1])
    return random.random(shape) >= rates


def scales_by_rule(loss_scale, flags):
    """The scales of `next_state` after each step, [steps, sequences]."""

    @tf.function
    def run(flags):
        zeros = tf.zeros_like(flags[0], tf.int64)
        scale = tf.zeros_like(flags[0], tf.float32) + loss_scale.value
        state = (scale, zeros, zeros)
        return tf.scan(
            lambda s, finite: loss_scale.next_state(finite, *s), flags, state
        )

    return run(tf.constant(flags))[0].numpy()


def grad_scaler(flags, initial, period, factor, backoff):
    """PyTorch's GradScaler (`_amp_update_scale_`), many at once, in float32."""
    scale = np.full(flags.shape[1], initial, np.float32)
    growth_tracker = np.zeros(flags.shape[1], int)
    history = []
    for finite in flags:
        successful = growth_tracker + 1
        grown = scale * np.float32(factor)
        grow = finite & (successful == period) & np.isfinite(grown)
        shrunk = scale * np.float32(backoff)
        scale = np.where(finite, np.where(grow, grown, scale), shrunk)
        growth_tracker = np.where(finite & (successful != period), successful, 0)
        history.append(scale)
    return np.array(history)


def documented(flags, initial, period, factor, backoff, minimum, maximum, hysteresis):
    """The pseudo-code of DynamicLossScale, many at once: (scale, good, bad) a step."""
    scale = np.full(flags.shape[1:], initial, np.float32)
    good_steps = np.zeros(flags.shape[1:], int)
    bad_steps = np.zeros(flags.shape[1:], int)
    history = []
    for finite in flags:
        good_steps = np.where(finite, good_steps + 1, 0)
        grow = finite & (good_steps == period)
        bad_steps = np.where(finite, bad_steps, bad_steps + 1)
        shrink = np.logical_not(finite) & (bad_steps >= hysteresis)
        scale = np.where(grow, np.minimum(scale * np.float32(factor), maximum), scale)
        scale = np.where(
            shrink, np.maximum(scale * np.float32(backoff), minimum), scale
        )
        good_steps, bad_steps = (np.where(grow, 0, n) for n in (good_steps, bad_steps))
        history.append((scale, good_steps, bad_steps))
    return history


@pytest.mark.parametrize("factor, backoff", [(2.0, 0.5), (1.7, 0.3)])
def test_rule_is_grad_scalers_away_from_the_bounds(factor, backoff):
    arguments = dict(initial=2.0**10, period=5, factor=factor, backoff=backoff)
    flags = random_flags((NUM_STEPS, NUM_SEQUENCES))
    scale = DynamicLossScale(**arguments, minimum=2.0**-126, maximum=2.0**126)
    expected = grad_scaler(flags, **arguments)
    assert expected.min() > 2.0**-126 and len(np.unique(expected)) > 40
    np.testing.assert_array_equal(scales_by_rule(scale, flags), expected)


@pytest.mark.parametrize("period, hysteresis", [(1, 1), (2, 3), (5, 2)])
def test_bounds_and_hysteresis_as_documented(period, hysteresis):
    arguments = dict(initial=1.0, period=period, factor=2.0, backoff=0.5)
    arguments.update(minimum=2.0**-3, maximum=2.0**4, hysteresis=hysteresis)
    flags = random_flags((NUM_STEPS, NUM_SEQUENCES), seed=1)
    scales = scales_by_rule(DynamicLossScale(**arguments), flags)
    assert (scales.min(), scales.max()) == (2.0**-3, 2.0**4)
    expected = [state[0] for state in documented(flags, **arguments)]
    np.testing.assert_array_equal(scales, expected)


@pytest.mark.parametrize(
    "replicas, compiled, merged",
    [(0, False, False), (0, True, False), (1, True, True), (1, False, True)]
    + [(n, False, merged) for n in (2, 4) for merged in (False, True)],
)
def test_class_follows_its_docstring(strategy_of, replicas, compiled, merged):
    """Hundreds of sequences end to end, by `adjust` in a loop on the device."""
    arguments = dict(initial=4.0, period=3, factor=2.0, backoff=0.5)
    arguments.update(minimum=2.0**-6, maximum=2.0**8, hysteresis=2)
    num_steps = 300 if merged else 3000
    flags = random_flags((10, num_steps // 10), seed=2).T.reshape(-1)
    strategy = strategy_of(replicas)
    with strategy.scope():
        loss_scale = DynamicLossScale(**arguments)

    def adjust_merged(strategy, finite):
        loss_scale.adjust(strategy.experimental_local_results(finite)[0])

    def replica_step(finite):
        context = tf.distribute.get_replica_context()
        context.merge_call(adjust_merged, args=(finite,))

    @tf.function(jit_compile=compiled)
    def run(flags):
        history = tf.TensorArray(tf.float32, num_steps)
        for i in tf.range(num_steps):
            if merged:
                strategy.run(replica_step, args=(flags[i],))
            else:
                loss_scale.adjust(flags[i])
            history = history.write(i, loss_scale.value)
        return history.stack()

    scales = run(tf.constant(flags))
    expected = documented(flags, **arguments)
    np.testing.assert_array_equal(scales, [state[0] for state in expected])
    named = {v.name.split(":")[0]: v for v in loss_scale.variables}
    scale, *steps = expected[-1]
    for variable, value in ((named["scale"], scale), (named["steps"], steps)):
        assert variable.aggregation == tf.VariableAggregation.ONLY_FIRST_REPLICA
        copies = strategy.experimental_local_results(variable)
        assert len(copies) == max(replicas, 1)
        assert all(copy.numpy().tolist() == np.array(value).tolist() for copy in copies)


@pytest.mark.parametrize("hysteresis", [1, 2])
def test_grow_is_adjust_of_a_finite_step(hysteresis):
    scales = [DynamicLossScale(initial=8.0, period=3, maximum=32.0,
                               hysteresis=hysteresis) for _ in range(2)]
    for finite in [True] * 4 + [False] + [True] * 13:
        if finite:
            scales[0].grow()
        else:
            scales[0].adjust(False)
        scales[1].adjust(finite)
        states = [(float(s.value), int(s.good_steps), int(s.bad_steps)) for s in scales]
        assert states[0] == states[1]
    assert float(scales[0].value) == 32.0


def test_eager_adjust_with_python_flags():
    loss_scale = DynamicLossScale(initial=8.0, period=2)
    seen = []
    for finite in (True, True, False, False, True):
        loss_scale.adjust(finite)
        seen.append(float(loss_scale.value))
    assert seen == [8.0, 16.0, 8.0, 4.0, 4.0]
    assert (int(loss_scale.good_steps), int(loss_scale.bad_steps)) == (1, 2)


def test_never_zero_never_infinite():
    loss_scale = DynamicLossScale(period=1)
    step = tf.function(loss_scale.adjust)
    for _ in range(200):
        step(tf.constant(False))
    assert float(loss_scale.value) == 2.0**-14
    for _ in range(200):
        step(tf.constant(True))
    assert float(loss_scale.value) == 2.0**24
    step(tf.constant(False))
    assert float(loss_scale.value) == 2.0**23


@pytest.mark.parametrize("finite", [True, False])
def test_inactive_step_changes_nothing(finite):
    loss_scale = DynamicLossScale(period=2, hysteresis=2)
    for flag in (False, True):
        loss_scale.adjust(flag)
    before = [v.numpy().tolist() for v in loss_scale.variables]
    tf.function(loss_scale.adjust)(tf.constant(finite), tf.constant(False))
    assert [v.numpy().tolist() for v in loss_scale.variables] == before


def test_a_changing_scale_does_not_retrace():
    loss_scale = DynamicLossScale(period=1)
    traces = []

    @tf.function
    def step(finite):
        traces.append(1)
        loss = loss_scale.scale(tf.constant(1.0), loss_scale.value)
        loss_scale.adjust(finite)
        return loss

    losses = [float(step(tf.constant(f))) for f in (True, True, False, False)]
    assert losses == [2.0**15, 2.0**16, 2.0**17, 2.0**16]
    assert len(traces) == 1


@pytest.mark.parametrize("make", [NoLossScale, lambda: StaticLossScale(1024)])
def test_static_scales_never_move(make):
    loss_scale = make()
    value = float(loss_scale.value)
    loss_scale.adjust(tf.constant(False))
    loss_scale.adjust_shared(loss_scale.register(), tf.constant(False))
    assert float(loss_scale.value) == value and loss_scale.value.dtype == tf.float32
    assert not loss_scale.is_dynamic and not loss_scale.variables
    assert DynamicLossScale().is_dynamic


@pytest.mark.parametrize("loss_scale", [StaticLossScale(2.0**15), DynamicLossScale()])
def test_scale_and_unscale(loss_scale):
    tree = {
        "half": tf.constant([3.0], tf.float16),
        "brain": tf.constant([3.0], tf.bfloat16),
        "single": [tf.Variable([3.0]), keras.Variable([3.0])],
        "double": np.array([3.0]),
        "python": 3.0,
        "ids": tf.constant([7]),
        "count": 7,
        "none": None,
    }
    scaled = loss_scale.scale(tree)
    # In float16 this would be inf.
    assert scaled["half"].numpy().tolist() == [3 * 2.0**15]
    dtypes = [scaled[key].dtype for key in ("half", "brain", "double", "python")]
    assert dtypes == [tf.float32, tf.float32, tf.float64, tf.float32]
    assert scaled["ids"] is tree["ids"] and scaled["none"] is None
    assert scaled["count"] == 7
    restored = tf.nest.flatten(loss_scale.unscale(scaled))
    floats = [
        leaf for leaf in restored if tf.is_tensor(leaf) and leaf.dtype.is_floating
    ]
    assert [float(tf.squeeze(leaf)) for leaf in floats] == [3.0] * 6


def test_scale_of_the_step_is_used_where_given():
    loss_scale = DynamicLossScale()
    value = tf.constant(4.0)
    assert float(loss_scale.scale(tf.constant(3.0), value=value)) == 12.0
    assert float(loss_scale.unscale(tf.constant(3.0), value=value)) == 0.75
    assert float(NoLossScale().scale(tf.constant(3.0))) == 3.0


def test_row_gradients_are_scaled_by_their_values():
    rows = tf.constant([[2.0, 4.0]], tf.float16)
    slices = tf.IndexedSlices(rows, tf.constant([5]), tf.constant([9, 2]))
    scaled = StaticLossScale(2.0).unscale([slices])[0]
    assert isinstance(scaled, tf.IndexedSlices) and scaled.values.dtype == tf.float32
    np.testing.assert_array_equal(scaled.values, [[1.0, 2.0]])
    assert scaled.indices.numpy().tolist() == [5]
    assert scaled.dense_shape.numpy().tolist() == [9, 2]


def test_state_is_checkpointed(tmp_path):
    loss_scale = DynamicLossScale(initial=8.0, period=9)
    for finite in (False, True, True):
        loss_scale.adjust(finite)
    path = tf.train.Checkpoint(loss_scale=loss_scale).save(str(tmp_path / "c"))
    restored = DynamicLossScale(period=9)
    status = tf.train.Checkpoint(loss_scale=restored).restore(path)
    status.assert_existing_objects_matched()
    assert float(restored.value) == 4.0
    assert (int(restored.good_steps), int(restored.bad_steps)) == (2, 1)


@pytest.mark.parametrize("replicas, compiled", [(0, False), (0, True), (2, False)])
@pytest.mark.parametrize("sharers", [1, 2, 3])
def test_sharers_adjust_once_on_the_and(strategy_of, replicas, compiled, sharers):
    arguments = dict(initial=4.0, period=2, factor=2.0, backoff=0.5)
    arguments.update(minimum=2.0**-6, maximum=2.0**8, hysteresis=1)
    with strategy_of(replicas).scope():
        loss_scale = DynamicLossScale(**arguments)
    assert [loss_scale.register() for _ in range(sharers)] == list(range(sharers))
    steps = [
        tf.function(
            lambda finite, active, i=i: loss_scale.adjust_shared(i, finite, active),
            jit_compile=compiled,
        )
        for i in range(sharers)
    ]
    random = np.random.default_rng(3)
    flags, contributed, decided = [], {}, 4.0
    for _ in range(200):
        index = random.integers(sharers)  # some contribute twice before others
        finite, active = random.random(2) < 0.7
        steps[index](tf.constant(finite), tf.constant(active))
        contributed.setdefault(index, []).extend([finite] if active else [])
        if len(contributed) == sharers:
            parts = [part for parts in contributed.values() for part in parts]
            flags += [all(parts)] if parts else []
            contributed = {}
            states = documented(np.array(flags, bool), **arguments)
            decided = states[-1][0] if states else 4.0
        assert float(loss_scale.value) == decided
    assert len(flags) > 20 and len(set(flags)) == 2


def test_all_inactive_sharers_change_nothing():
    loss_scale = DynamicLossScale(initial=8.0, period=1)
    first, second = loss_scale.register(), loss_scale.register()
    for finite in (True, False):
        loss_scale.adjust_shared(first, finite, False)
        loss_scale.adjust_shared(second, finite, False)
    assert float(loss_scale.value) == 8.0
    # The round was closed: the next one needs both again.
    loss_scale.adjust_shared(first, True)
    assert float(loss_scale.value) == 8.0
    loss_scale.adjust_shared(second, True)
    assert float(loss_scale.value) == 16.0


def test_nobody_registered_is_one():
    loss_scale = DynamicLossScale(initial=8.0)
    loss_scale.adjust_shared(0, False)
    assert float(loss_scale.value) == 4.0


def test_registering_after_the_first_step_is_an_error():
    loss_scale = DynamicLossScale()
    loss_scale.adjust_shared(loss_scale.register(), True)
    with pytest.raises(ConfigError, match="in use by 1 cannot take another"):
        loss_scale.register()


@pytest.mark.parametrize(
    "argument, value",
    [
        ("initial", 2.0**25),
        ("initial", 2.0**-15),
        ("initial", float("nan")),
        ("initial", "big"),
        ("initial", True),
        ("minimum", 0.0),
        ("minimum", -1.0),
        ("minimum", 1e-46),  # 0 in float32
        ("maximum", float("inf")),
        ("maximum", 2.0**127),  # its reciprocal is subnormal
        ("factor", 1.0),
        ("factor", float("inf")),
        ("backoff", 0.0),
        ("backoff", 1.0),
        ("period", 0),
        ("period", 2.5),
        ("hysteresis", 0),
    ],
)
def test_wrong_arguments(argument, value):
    with pytest.raises(
        ConfigError, match=re.escape(f"`{argument}` ({value})")
    ) as error:
        DynamicLossScale(**{argument: value})
    assert error.value.remedy


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan"), 2.0**127])
def test_wrong_static_value(value):
    with pytest.raises(ConfigError, match="`value`") as error:
        StaticLossScale(value)
    assert error.value.remedy == "Use a power of two such as 1024."


@pytest.mark.parametrize(
    "name, policy, kind, value",
    [
        ("auto", "mixed_float16", DynamicLossScale, 2.0**15),
        ("auto", "float16", DynamicLossScale, 2.0**15),
        ("auto", "mixed_bfloat16", NoLossScale, 1.0),
        ("auto", "float32", NoLossScale, 1.0),
        ("auto", "native", NoLossScale, 1.0),
        ("none", "mixed_float16", NoLossScale, 1.0),
        ("dynamic", "float32", DynamicLossScale, 2.0**15),
        ("1024", "float32", StaticLossScale, 1024.0),
        (0.5, "float32", StaticLossScale, 0.5),
    ],
)
def test_loss_scale_by_name(name, policy, kind, value):
    loss_scale = get_loss_scale(name, get_policy(policy))
    assert type(loss_scale) is kind and float(loss_scale.value) == value
    assert get_loss_scale(loss_scale, get_policy(policy)) is loss_scale


def test_auto_sees_float16_overrides_and_needs_no_policy():
    policy = get_policy("float32", {"encoder": "mixed_float16"})
    assert get_loss_scale("auto", policy).is_dynamic
    assert not get_loss_scale("auto").is_dynamic


@pytest.mark.parametrize("name", ["big", "nan", "0", None, -2, "inf", 1e300, []])
def test_unknown_loss_scale(name):
    with pytest.raises(ConfigError) as error:
        get_loss_scale(name, get_policy("float32"))
    assert error.value.cause == (
        f"`loss_scale` ({name}) must be auto, none, dynamic or a number from 2**-126 "
        "to 2**126.")
