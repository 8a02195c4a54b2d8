"""The character model computes what it says, in every policy, learns and writes."""

import math

import numpy as np
import pytest
import tensorflow as tf

import mpl
from experiments.char_lm import BitsPerCharacter, CharLm, Config
from experiments.datasets import text
from experiments.models import trigram
from experiments.models.gpt import Gpt
from mpl.record.checkpoint import Checkpoints

POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")
KINDS = ("gpt", "lstm")
SMALL = dict(length=16, depth=1, width=16, global_batch_size=8, train_steps=4,
             sample_chars=12, train_epochs=None, warmup_steps=0)


def prepared(strategy, **settings):
    experiment = CharLm()
    experiment.setup(Config(**{**SMALL, **settings}), strategy)
    return experiment


@pytest.fixture
def data_dir(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    lines = (f"{n} bottles of beer on the wall, é.\n" for n in range(60))
    (folder / "a.txt").write_text("".join(lines))
    return str(folder)


def gpt(**settings):
    settings = {"vocabulary": 11, "length": 6, "depth": 2, "width": 8, "num_heads": 2,
                "dropout": 0.0, "policy": mpl.get_policy("float32"), **settings}
    return Gpt(**settings)


def test_it_is_the_transformer_of_its_source():
    model, random = gpt(), np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(random.normal(0, 0.5, variable.shape))
    ids = random.integers(0, 11, (3, 6))

    def norm(x, of):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * of.gain.numpy() + of.bias.numpy()

    def gelu(x):
        return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2

    def attention(x, block):
        query, key, value = np.split(x @ block.to_qkv.numpy(), 3, -1)
        mixed = np.zeros_like(x)
        for head in (slice(0, 4), slice(4, 8)):
            for row in range(6):
                past = slice(0, row + 1)
                scores = np.einsum(
                    "bd,btd->bt", query[:, row, head], key[:, past, head]) / 2
                shares = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
                mixed[:, row, head] = np.einsum(
                    "bt,btd->bd", shares, value[:, past, head])
        return mixed @ block.to_out.numpy()

    table = model.table.numpy()
    x = table[ids] + model.positions.numpy()
    for block in model.blocks:
        x = x + attention(norm(x, block.norm_1), block)
        hidden = gelu(norm(x, block.norm_2) @ block.up.numpy() + block.up_bias.numpy())
        x = x + hidden @ block.down.numpy() + block.down_bias.numpy()
    want = norm(x, model.norm) @ table.T
    np.testing.assert_allclose(model(ids), want, rtol=1e-4, atol=1e-4)


def test_what_comes_later_does_not_matter():
    model, ids = gpt(), np.array([[1, 2, 3, 4, 5, 6]])
    first = model(ids).numpy()
    ids[0, 4:] = 9, 10
    later = model(ids).numpy()
    np.testing.assert_array_equal(first[:, :4], later[:, :4])
    assert (first[:, 4:] != later[:, 4:]).all()


def test_weights_begin_as_in_the_source():
    model = gpt(vocabulary=256, length=64, width=128, depth=8)
    block = model.blocks[3]
    for variable, stddev in ((model.table, 0.02), (block.to_qkv, 0.02),
                             (block.to_out, 0.005), (block.down, 0.005)):
        assert np.std(variable.numpy()) == pytest.approx(stddev, rel=0.05)


@pytest.mark.parametrize("policy", POLICIES)
def test_dtypes_are_those_of_the_policy(policy, data_dir, strategy_of):
    experiment = prepared(strategy_of(1), policy=policy, data_dir=data_dir)
    params = experiment.weights.cast()
    assert {param.dtype for param in params} == {experiment.policy.compute_dtype}
    with experiment.weights.bound(params):
        model = experiment.model
        assert model.table.dtype == experiment.policy.compute_dtype
        assert model.norm(tf.ones([1, 4, 16])).dtype == experiment.policy.compute_dtype
        assert model(tf.ones([2, 16], tf.int32)).dtype == tf.float32
    assert model.table.dtype == tf.float32


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_two_steps(kind, policy, replicas, data_dir, strategy_of):
    experiment = prepared(
        strategy_of(replicas), model=kind, policy=policy, data_dir=data_dir)
    experiment.trainer.train(2)
    report = experiment.train_report()
    assert report["applied_steps"] == 2 and report["grad_norm"] > 0
    values = experiment.evaluators["test"].evaluate(-1)
    assert 0 < float(values["entropy_bits_per_char"]) < 9


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_run_continues_bit_for_bit(kind, data_dir, strategy_of, tmp_path):
    settings = dict(model=kind, policy="mixed_float16", data_dir=data_dir, dropout=0.5)
    whole = prepared(strategy_of(1), **settings)
    whole.trainer.train(2)
    Checkpoints(
        tmp_path / "run", asynchronous=False, **whole.checkpoint_objects()).save(2)
    whole.trainer.train(2)
    rest = prepared(strategy_of(1), **settings)
    assert Checkpoints(tmp_path / "run", **rest.checkpoint_objects()).resume() == 2
    rest.after_restore()
    rest.trainer.train(2)
    want = whole.weights.by_key()
    for key, value in rest.weights.by_key().items():
        np.testing.assert_array_equal(value, want[key], err_msg=key)
    slots = [each.optimizer.export_slots() for each in (rest, whole)]
    assert slots[0].keys() == slots[1].keys()
    for key, value in slots[1].items():
        np.testing.assert_array_equal(slots[0][key], value, err_msg=key)


@pytest.mark.slow
def test_dropout_is_drawn_anew_in_each_step(data_dir, strategy_of):
    experiment = prepared(strategy_of(1), dropout=0.5, data_dir=data_dir,
                          policy="float32", learning_rate=0.0, train_steps=9)
    seeds = [experiment.weights.state[0].value.numpy()]
    for _ in range(2):
        experiment.trainer.train(1)
        seeds.append(experiment.weights.state[0].value.numpy())
    assert len({tuple(seed) for seed in seeds}) == 3


def test_norms_and_biases_do_not_decay(data_dir, strategy_of):
    for kind in KINDS:
        experiment = prepared(strategy_of(1), model=kind, data_dir=data_dir)
        decay = {entry.name: bucket.kind.decay for bucket in experiment.weights.buckets
                 for entry in bucket.entries}
        for name, decays in decay.items():
            assert decays != ("norm" in name or "bias" in name), name
        assert set(decay.values()) == {True, False}


def test_bits_are_those_of_characters(data_dir, strategy_of):
    """The second byte of a character counts for its bits alone."""
    metric = BitsPerCharacter()
    losses = tf.constant([[1.0, 2.0, 3.0, 7.0]]) * math.log(2)
    begins, weights = tf.constant([[1.0, 1, 0, 1]]), tf.constant([[1.0, 1, 1, 0]])
    metric.update_state(losses, begins, sample_weight=weights)
    assert float(metric.result()) == pytest.approx(6 / 2)
    metric.update_state(losses, begins, sample_weight=tf.constant([[0.0, 0, 1, 1]]))
    assert float(metric.result()) == pytest.approx(16 / 3)

    experiment = prepared(strategy_of(1), data_dir=data_dir, policy="float32",
                          global_batch_size=2)
    rows = np.zeros([2, 17], np.uint8)
    rows[0, :4], rows[1, :2] = list("aé".encode()) + [99], [97, 98]
    batch = {"text": tf.constant(rows), "weight": tf.constant([1.0, 0.0])}
    with experiment.bound_for_inference():
        output = experiment.loss(batch, training=False)
        logits = experiment.model(experiment.given(batch)).numpy().astype(np.float64)
    chances = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = [-chances[0, place, rows[0, place + 1]] for place in range(3)]
    np.testing.assert_allclose(output.per_example[0, :3], want, rtol=1e-5)
    assert output.weights.numpy().tolist() == [[1 / 16] * 3 + [0.0] * 13, [0.0] * 16]
    assert output.outputs[1][0, :3].numpy().tolist() == [1.0, 0.0, 1.0]


def test_the_documentation_is_the_default_and_is_named(strategy_of, capsys):
    experiment = prepared(strategy_of(1), policy="float32")
    said = capsys.readouterr().out
    assert "Text: the documentation of Python 3." in said and "SHA-256" in said
    for split in ("validation", "test"):
        assert f"{split}: " in said and "a trigram model needs " in said
        assert experiment.pipelines[split].num_examples > 500
    assert experiment.pipelines["train"].num_examples > 10_000


def test_the_baseline_is_that_of_the_splits(data_dir, strategy_of, capsys):
    prepared(strategy_of(1), policy="float32", data_dir=data_dir)
    said = capsys.readouterr().out
    for split in ("validation", "test"):
        bits = trigram.bits_per_character(
            text.load("train", data_dir), text.load(split, data_dir))
        assert f"a trigram model needs {bits:.3f} bits per character" in said


def prompts(tmp_path, *lines):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(lines))
    return str(path)


def written(experiment, path):
    batch, = experiment.read_input(path)
    return experiment.predictor()(batch)["text"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_depends_on_prompt_and_seed_alone(
    kind, data_dir, strategy_of, tmp_path
):
    def of(*lines, replicas=1, **settings):
        path = prompts(tmp_path, *lines)
        experiment = prepared(strategy_of(replicas), model=kind, policy="float32",
                              data_dir=data_dir, mode="predict", input=path, **settings)
        return written(experiment, path)

    first = of("12 bottles", "", "a rather longer prompt than a window", "é")
    assert first.shape == (3, 12) and first.dtype == np.uint8
    np.testing.assert_array_equal(of("é", "12 bottles")[::-1], first[[0, 2]])
    np.testing.assert_array_equal(of("é", replicas=2), first[2:])
    assert (of("é", sample_seed=1) != first[2]).any()
    # Of a longer prompt its end counts: as many bytes as a window has.
    np.testing.assert_array_equal(of("rompt than a window"[-16:]), first[1:2])


def test_a_cold_model_writes_the_likeliest(data_dir, strategy_of, tmp_path):
    path = prompts(tmp_path, "12 bot")
    experiment = prepared(
        strategy_of(1), policy="float32", data_dir=data_dir, mode="predict", input=path,
        temperature=1e-4, sample_chars=14)
    given = list(b"12 bot")
    with experiment.bound_for_inference():
        for _ in range(14):  # past the end of the window
            window = given[-16:]
            ids = np.array([window + [0] * (16 - len(window))], np.int32)
            given.append(int(np.argmax(experiment.model(ids)[0, len(window) - 1])))
    assert written(experiment, path).tolist() == [given[6:]]


def test_draws_follow_the_chances(data_dir, strategy_of, tmp_path):
    """The first byte after each of many prompts, of a model that knows two bytes."""
    lines = [f"{number} x" for number in range(400)]
    path = prompts(tmp_path, *lines)
    experiment = prepared(
        strategy_of(1), policy="float32", data_dir=data_dir, mode="predict", input=path,
        temperature=1.0, sample_chars=1, global_batch_size=512)
    logits = np.full(256, -30.0, np.float32)
    logits[[65, 200]] = math.log(0.3), math.log(0.7)
    experiment.logits_after = lambda window, count: (
        tf.zeros([tf.shape(window)[0], 1]) + logits)
    got = written(experiment, path)[:, 0]
    assert set(got) == {65, 200}
    assert 0.22 < (got == 65).mean() < 0.38  # 0.3 ± 3.5 standard deviations


def test_without_prompts_the_chances_of_the_next_byte(data_dir, strategy_of):
    experiment = prepared(strategy_of(1), policy="float32", data_dir=data_dir)
    rows = np.zeros([2, 17], np.uint8)
    rows[0, :3], rows[1] = list(b"abc"), 98
    got = experiment.predictor()({"text": rows})
    with experiment.bound_for_inference():
        logits = experiment.model(rows[:, :-1].astype(np.int32))
    np.testing.assert_allclose(got[0], tf.nn.softmax(logits[0, 2]), atol=1e-6)
    np.testing.assert_allclose(got[1], tf.nn.softmax(logits[1, 15]), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_trains_goes_on_exports_and_writes(kind, data_dir, tmp_path):
    settings = {**SMALL, "model": kind, "data_dir": data_dir,
                "policy": "mixed_bfloat16", "workdir": str(tmp_path / "run"),
                "lr_schedule": "constant"}
    mpl.run(CharLm, **{**settings, "train_steps": 2})
    results = mpl.run(CharLm, **settings, mode="all")
    assert 0 < results["test"]["entropy_bits_per_char"] < 9
    path = prompts(tmp_path, "12 bottles", "13 b")
    mpl.run(CharLm, **settings, mode="predict", input=path,
            output=str(tmp_path / "own.npz"))
    own = np.load(tmp_path / "own.npz")["text"]
    assert own.shape == (2, 12) and len(bytes(own[0])) == 12
    mpl.run(CharLm, **{**settings, "workdir": None}, mode="predict", input=path,
            saved_model=str(tmp_path / "run" / "export"),
            output=str(tmp_path / "saved.npz"))
    chances = np.load(tmp_path / "saved.npz")["predictions"]
    assert chances.shape == (2, 256)
    np.testing.assert_allclose(chances.sum(1), 1, rtol=1e-3)


@pytest.mark.parametrize("change, message", [
    (dict(width=17), r"`width` \(17\) must be divisible by `heads` \(4\).*--width=20"),
    (dict(model="lstm", heads=2), r"`heads` \(2\) has no effect on `model` \(lstm\)"),
    (dict(length=4000), "less than two windows of 4000")])
def test_bad_settings_are_named(change, message, data_dir, strategy_of):
    with pytest.raises(mpl.ConfigError, match=f"(?s){message}"):
        prepared(strategy_of(1), data_dir=data_dir, **change)


@pytest.mark.slow
@pytest.mark.parametrize("kind, policy", [
    ("gpt", "float32"), ("gpt", "mixed_bfloat16"), ("gpt", "mixed_float16"),
    ("lstm", "float32")])
def test_it_learns_what_three_characters_do_not_tell(
    kind, policy, tmp_path, strategy_of
):
    """In `7===7 ` it counts: of a digit nothing is known before, or of the other."""
    random = np.random.default_rng(0)
    (tmp_path / "a.txt").write_text("".join(
        f"{digit}==={digit} " for digit in random.integers(0, 10, 4000)))
    own = {"gpt": dict(learning_rate=3e-3, train_steps=300, heads=2),
           "lstm": dict(learning_rate=2e-2, train_steps=600, lr_schedule="cosine")}
    settings = {"lr_schedule": "constant", **own[kind]}
    experiment = prepared(
        strategy_of(1), model=kind, policy=policy, data_dir=str(tmp_path), width=32,
        global_batch_size=16, length=24, depth=0, warmup_steps=0, **settings)
    experiment.trainer.train(settings["train_steps"])
    values = experiment.evaluators["test"].evaluate(-1)
    bits = float(values["entropy_bits_per_char"])
    baseline = trigram.bits_per_character(*(
        text.load(split, str(tmp_path)) for split in ("train", "test")))
    assert baseline > 1.4  # 1.11 bits are left to who counts, 0.55 to who copies too
    assert 0.5 < bits < 0.9 * baseline
