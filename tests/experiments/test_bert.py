"""BERT on small files in the real layouts, against NumPy, in each policy."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

import mpl
from bert_files import (
    COUNTED, GOOD, LENGTH, MASKED, PIECES, V1, V2, record_arrays, write_pretraining,
    write_sst2, write_text, write_vocabulary)
from experiments import bert
from experiments.datasets import documentation
from experiments.models import bert as bert_model

SMALL = dict(policy="float32", layers=1, hidden=16, heads=2, length=LENGTH,
             masked=MASKED, global_batch_size=8, warmup_steps=0)


def prepared(strategy, **settings):
    experiment = bert.Bert()
    experiment.setup(bert.Config(**{**SMALL, **settings}), strategy)
    return experiment


def run(**settings):
    return mpl.run(bert.Bert, **{**SMALL, "strategy": "one_device", **settings})


def files_of(kind, folder):
    """Writes data of a kind, and returns the settings that read them."""
    vocab = write_vocabulary(folder)
    if kind == "sst2":
        return dict(task="glue", glue_task="sst2", vocab=vocab, masked=10,
                    data_dir=write_sst2(folder / "GLUE" / "SST-2"))
    if kind == "text":
        return dict(data_dir=write_text(folder))
    without = ("next_sentence_labels",) if kind == "v2" else ()
    return dict(data_dir=write_pretraining(folder, V2 if kind == "v2" else V1, without))


# The model


def values(layer, *names):
    return [getattr(layer, name).numpy().astype(np.float64) for name in names]


def normed(x, norm):
    gamma, beta = values(norm, "gamma", "beta")
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-12) * gamma + beta


def dense(x, layer):
    kernel, bias = values(layer, "kernel", "bias")
    return x @ kernel + bias


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def attended(x, real, block):
    """Attention of each head by itself."""
    query, key, value = np.split(dense(x, block.to_qkv), 3, -1)
    size, heads = x.shape[-1] // block.heads, []
    for number in range(block.heads):
        q, k, v = (part[..., number * size:(number + 1) * size]
                   for part in (query, key, value))
        scores = q @ k.swapaxes(1, 2) / math.sqrt(size)
        scores[np.broadcast_to(real[:, None, :] == 0, scores.shape)] = -np.inf
        heads.append(softmax(scores) @ v)
    return dense(np.concatenate(heads, -1), block.to_out)


def encoded(model, ids, real, segments):
    encoder = model.encoder
    (words,), (places,), (kinds,) = (values(layer, "embeddings") for layer in (
        encoder.words, encoder.places, encoder.segments))
    x = normed(words[ids] + places[:ids.shape[1]] + kinds[segments], encoder.norm)
    for block in encoder.blocks:
        x = normed(x + attended(x, real, block), block.norm_1)
        x = normed(x + dense(gelu(dense(x, block.up)), block.down), block.norm_2)
    return x


def test_the_model_is_that_of_the_paper():
    """Against NumPy in float64, with weights that are not small."""
    model = bert_model.Bert(
        masked_words=True, classes={"next_sentence": 2, "label": 3}, vocabulary=11,
        positions=20, depth=2, hidden=8, heads=2, dropout=0.5)
    model.build()
    random = np.random.default_rng(0)
    model.set_weights([random.normal(0.1, 0.4, weight.shape)
                       if weight.dtype == "float32" else weight.numpy()
                       for weight in model.weights])
    ids, segments = random.integers(0, 11, [3, 12]), random.integers(0, 2, [3, 12])
    real = (np.arange(12) < [[12], [7], [1]]).astype(int)
    places = random.integers(0, 12, [3, 4])
    logits = model(ids, real, segments, positions=places)
    assert logits.keys() == {"words", "next_sentence", "label"}

    x = encoded(model, ids, real, segments)
    head = model.masked_words
    chosen = np.take_along_axis(x, places[..., None], 1)
    chosen = normed(gelu(dense(chosen, head.transform)), head.norm)
    table, = values(model.encoder.words, "embeddings")
    bias, = values(head, "bias")
    np.testing.assert_allclose(logits["words"], chosen @ table.T + bias, atol=2e-5)
    pooled = np.tanh(dense(x[:, 0], model.pooler))
    for name in ("next_sentence", "label"):
        want = dense(pooled, getattr(model, name))
        np.testing.assert_allclose(logits[name], want, atol=2e-5)


def test_weights_start_alike_in_size_and_differ_from_each_other():
    model = bert_model.Bert(
        masked_words=True, classes={}, vocabulary=50, positions=8, depth=2, hidden=32,
        heads=4, dropout=0.1)
    model.build()
    matrices = [weight.numpy() for weight in model.trainable_weights
                if len(weight.shape) == 2]
    # Three tables, four matrices in each block, one of the head.
    assert len(matrices) == 3 + 2 * 4 + 1
    size = 0.02 * math.sqrt(768 / 32)
    for matrix in matrices:
        assert np.abs(matrix).max() <= 2 * size + 1e-6  # cut at two standard deviations
    spread = np.concatenate([matrix.ravel() for matrix in matrices]).std()
    assert 0.8 < spread / size < 0.95
    first, second = (block.up.kernel.numpy() for block in model.encoder.blocks)
    assert (first != second).any()


# Loss and metrics


def log_softmax(x):
    return np.log(softmax(np.asarray(x, np.float64)))


def test_loss_and_metrics_of_pretraining(strategy_of, tmp_path):
    """12 examples in batches of 8: the second is filled up with weights of 0."""
    experiment = prepared(strategy_of(1), **files_of("v1", tmp_path))
    got = experiment.evaluators["validation"].evaluate(-1)
    batch = record_arrays(12, seed=1)
    logits = experiment.logits(
        {name: array.astype(np.int32) for name, array in batch.items()}, training=False)

    words, counts = batch["masked_lm_ids"], batch["masked_lm_weights"]
    chances = log_softmax(logits["words"])
    of_words = -np.take_along_axis(chances, words[..., None], -1)[..., 0]
    of_pairs = -np.take_along_axis(
        log_softmax(logits["next_sentence"]), batch["next_sentence_labels"], -1)[:, 0]
    # A pair counts like any other; all of them as much as words are expected: as many
    # in a sequence as in the first file of the training records, each second one.
    expected = record_arrays(24)["masked_lm_weights"][::2].sum(1).mean()
    assert experiment.words == pytest.approx(expected)
    means = (of_words * counts).sum() / counts.sum(), of_pairs.mean()
    want = means[0] + means[1] * expected / counts.sum(1).mean()
    np.testing.assert_allclose(float(got["loss"]), want, rtol=1e-5)
    right = (chances.argmax(-1) == words) * counts
    np.testing.assert_allclose(
        float(got["accuracy"]), right.sum() / counts.sum(), rtol=1e-6)
    right = logits["next_sentence"].numpy().argmax(-1) == batch["next_sentence_labels"][
        :, 0]
    np.testing.assert_allclose(float(got["next_sentence"]), right.mean(), rtol=1e-6)

    # Of as many words as expected the loss is the sum of both means.
    experiment.words = counts.sum(1).mean()
    features = {name: tf.constant(array if array.dtype.kind == "f" else array.astype(
        np.int32)) for name, array in batch.items()}
    features["next_sentence_labels"] = features["next_sentence_labels"][:, 0]
    output = experiment.loss({**features, "weight": tf.ones(12)}, training=False)
    total = float(tf.reduce_sum(output.per_example * output.weights))
    np.testing.assert_allclose(
        total / float(tf.reduce_sum(output.weights)), sum(means), rtol=1e-5)


def test_loss_of_a_task(strategy_of, tmp_path):
    experiment = prepared(strategy_of(1), **files_of("sst2", tmp_path))
    got = experiment.evaluators["validation"].evaluate(-1)
    total, right, count = 0.0, 0, 0
    for batch in experiment.pipelines["validation"].dataset():
        logits = log_softmax(experiment.logits(batch, training=False)["label"])
        for label, row, weight in zip(batch["label"], logits, batch["weight"]):
            total -= row[int(label)] * float(weight)
            right += (row.argmax() == int(label)) * float(weight)
            count += float(weight)
    assert count == 192 and experiment.headline() == "accuracy"
    np.testing.assert_allclose(float(got["loss"]), total / count, rtol=1e-5)
    np.testing.assert_allclose(float(got["accuracy"]), right / count)


# Steps


@pytest.mark.slow
@pytest.mark.parametrize("kind, policy, replicas", [
    ("v1", "float32", 1), ("v1", "mixed_float16", 2), ("v2", "mixed_bfloat16", 1),
    ("text", "float32", 2), ("text", "mixed_bfloat16", 2), ("text", "mixed_float16", 1),
    ("sst2", "float32", 2), ("sst2", "mixed_bfloat16", 1), ("sst2", "mixed_float16", 1),
])
def test_two_steps(kind, policy, replicas, strategy_of, tmp_path):
    experiment = prepared(
        strategy_of(replicas), policy=policy, **files_of(kind, tmp_path))
    before = experiment.model.encoder.words.embeddings.numpy()
    experiment.trainer.train(2)
    report = experiment.train_report()
    assert report["applied_steps"] + report["skipped_steps"] == 2
    assert report["applied_steps"] == 2 or policy == "mixed_float16"
    assert np.isfinite(report["loss"]) and report["grad_norm"] > 0
    assert report.keys() >= {"accuracy", *(["next_sentence"] * (kind == "v1"))}
    assert ("next_sentence" in report) == (kind == "v1")
    after = experiment.model.encoder.words.embeddings.numpy()
    assert (before != after).any() == (report["applied_steps"] > 0)
    values = experiment.evaluators["validation"].evaluate(-1)
    assert 0 <= float(values["accuracy"]) <= 1 and float(values["loss"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "v1"])
def test_replicas_train_as_one_device_does(kind, strategy_of, tmp_path):
    settings = files_of(kind, tmp_path)
    results = []
    for replicas in (1, 2):
        experiment = prepared(strategy_of(replicas), **settings)
        experiment.trainer.train(5)
        results.append(experiment.evaluators["validation"].evaluate(-1)["loss"])
    np.testing.assert_allclose(*map(float, results), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "sst2"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(kind, tmp_path):
    """With dropout, and masks that are drawn anew."""
    settings = dict(lr_schedule="constant", dropout=0.1, **files_of(kind, tmp_path))
    whole = run(train_steps=6, workdir=str(tmp_path / "whole"), **settings)
    run(train_steps=2, workdir=str(tmp_path / "parts"), **settings)
    rest = run(train_steps=6, workdir=str(tmp_path / "parts"), **settings)
    assert rest["validation"] == whole["validation"]


@pytest.mark.slow
def test_a_step_of_a_task_compiles(tmp_path):
    result = run(jit_compile=True, train_steps=2, workdir=str(tmp_path / "run"),
                 **files_of("sst2", tmp_path))
    assert result["train"]["applied_steps"] == 2
    assert np.isfinite(result["validation"]["loss"])


@pytest.mark.slow
def test_lamb_moves_each_matrix_in_proportion_to_its_norm(strategy_of, tmp_path):
    """The first step of a matrix w has the norm rate × ‖w‖, whatever its gradient."""
    experiment = prepared(
        strategy_of(1), optimizer="lamb", learning_rate=0.01, lr_schedule="constant",
        weight_decay=0.0, **files_of("v1", tmp_path))
    assert isinstance(experiment.optimizer.inner, keras.optimizers.Lamb)
    before = [weight.numpy() for weight in experiment.model.trainable_weights]
    experiment.trainer.train(1)
    for old, weight in zip(before, experiment.model.trainable_weights, strict=True):
        if old.any():  # else a bias, which begins with zeros
            step = np.linalg.norm(weight.numpy() - old)
            np.testing.assert_allclose(step / np.linalg.norm(old), 0.01, rtol=1e-3)


def test_what_decays(strategy_of, tmp_path):
    experiment = prepared(strategy_of(1), **files_of("v1", tmp_path))
    decays = {(entry.key.rpartition("/")[2], bucket.kind.decay)
              for bucket in experiment.weights.buckets for entry in bucket.entries}
    assert decays == {("kernel", True), ("embeddings", True), ("bias", False),
                      ("gamma", False), ("beta", False)}
    assert not any(bucket.kind.sparse for bucket in experiment.weights.buckets)
    assert experiment.optimizer.inner.weight_decay == 0.01


# From one task to the next, and out


@pytest.mark.slow
def test_a_task_begins_with_pretrained_weights(strategy_of, tmp_path):
    settings = files_of("v1", tmp_path)
    run(train_steps=3, workdir=str(tmp_path / "words"), **settings)
    pretrained = prepared(strategy_of(1), **settings)
    pretrained.init_from(str(tmp_path / "words"))
    tuned = prepared(strategy_of(1), **files_of("sst2", tmp_path))
    own_head = tuned.model.label.kernel.numpy()
    report = tuned.init_from(str(tmp_path / "words"))
    assert "as initialised: " in report and "left out: " in report
    shared = [(old, new) for old, new in (
        (getattr(pretrained.model, part), getattr(tuned.model, part))
        for part in ("encoder", "pooler"))]
    for old, new in shared:
        for one, other in zip(old.weights, new.weights, strict=True):
            np.testing.assert_array_equal(one.numpy(), other.numpy())
    np.testing.assert_array_equal(tuned.model.label.kernel.numpy(), own_head)
    fresh = prepared(strategy_of(1), **settings)
    table = fresh.model.encoder.words.embeddings.numpy()
    assert (table != tuned.model.encoder.words.embeddings.numpy()).any()


def first_lines(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


@pytest.mark.slow
def test_masked_words_are_named(tmp_path):
    settings = files_of("text", tmp_path)
    lines = first_lines(tmp_path / "lines.txt", [
        "one two [MASK] four", "[MASK] two [MASK] four five [MASK]"])
    work = str(tmp_path / "run")
    run(mode="all", train_steps=2, workdir=work, **settings)
    run(mode="predict", workdir=work, input=lines, output=str(tmp_path / "a.npz"))
    run(mode="predict", saved_model=f"{work}/export", input=lines, **settings,
        output=str(tmp_path / "b.npz"))
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        np.testing.assert_array_equal(a["token"], b["token"])
        np.testing.assert_allclose(a["probability"], b["probability"], rtol=1e-5)
        assert a["token"].shape == (2, MASKED) and a["token"].dtype == np.int32
        found = [[True, False, False], [True] * 3]
        np.testing.assert_array_equal(a["token"] >= 0, found)
        np.testing.assert_array_equal(a["probability"] > 0, found)
    with np.load(f"{work}/predictions.npz") as of_validation:
        assert of_validation["token"].shape[1] == MASKED


@pytest.mark.slow
def test_texts_are_judged(tmp_path):
    settings = files_of("sst2", tmp_path)
    work = str(tmp_path / "run")
    run(mode="all", train_steps=2, workdir=work, **settings)
    texts = [f"the film is {word} ." for word in GOOD]
    plain = first_lines(tmp_path / "lines.txt", texts)
    table = first_lines(tmp_path / "test.tsv", [
        "index\tsentence", *(f"{n}\t{text}" for n, text in enumerate(texts))])
    results = []
    for path in (plain, table):
        run(mode="predict", workdir=work, input=path, masked=10,
            output=str(tmp_path / "a.npz"))
        with np.load(tmp_path / "a.npz") as arrays:
            results.append(arrays["predictions"])
    np.testing.assert_array_equal(*results)
    assert results[0].shape == (4, 2)
    np.testing.assert_allclose(results[0].sum(1), 1, rtol=1e-5)
    exported = mpl.load_predictor(f"{work}/export")
    experiment = bert.Bert()
    experiment.config = bert.Config(**{**SMALL, **settings})
    batch, = experiment.read_input(plain)
    np.testing.assert_allclose(exported(batch), results[0], atol=1e-6)


# Learning


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_a_task_is_learnt(policy, strategy_of, tmp_path):
    experiment = prepared(
        strategy_of(1), policy=policy, hidden=32, global_batch_size=16,
        learning_rate=2e-3, train_steps=60, train_epochs=None,
        **files_of("sst2", tmp_path))
    experiment.trainer.train(60)
    values = experiment.evaluators["validation"].evaluate(-1)
    assert float(values["accuracy"]) >= 0.9, values


@pytest.mark.slow
def test_masked_words_are_learnt(strategy_of, tmp_path):
    """Of a text that counts to eight again and again, from any number on."""
    experiment = prepared(
        strategy_of(1), hidden=64, length=17, global_batch_size=32, learning_rate=3e-3,
        warmup_steps=50, train_steps=250, train_epochs=None,
        **files_of("text", tmp_path))
    before = experiment.evaluators["validation"].evaluate(-1)
    experiment.trainer.train(250)
    values = experiment.evaluators["validation"].evaluate(-1)
    assert float(before["accuracy"]) < 0.5
    assert float(values["accuracy"]) >= 0.9, values
    predict, words, named = experiment.predictor(), (COUNTED * 2)[:15], 0
    ids = [2, *(PIECES.index(word) for word in words), 3]
    for place, word in enumerate(words, 1):
        asked = np.array([ids], np.int32)
        asked[0, place] = PIECES.index("[MASK]")
        answer = predict({
            "input_ids": asked, "input_mask": np.ones_like(asked),
            "segment_ids": 0 * asked, "masked_lm_positions": np.int32([[place, 0, 0]])})
        assert answer["token"][0, 1:].tolist() == [-1, -1]
        named += PIECES[answer["token"][0, 0]] == word
    assert named >= 13


# Settings and defaults


def test_the_default_data_are_named(strategy_of, capsys):
    experiment = prepared(strategy_of(1), length=64, masked=10)
    out = capsys.readouterr().out
    assert out.count("Data: ") == 1
    assert f"Data: {documentation.describe()}; 2048 word pieces\n" in out
    assert set(experiment.num_examples) == {"train", "validation", "test"}
    experiment = prepared(strategy_of(1), task="glue", masked=10)
    assert f"Data: {documentation.describe()}" in capsys.readouterr().out
    assert set(experiment.num_examples) == {"train", "validation", "test"}


@pytest.mark.parametrize("change, message", [
    (dict(hidden=10, heads=4), r"`hidden` \(10\) must be divisible by `heads` \(4\)"),
    (dict(length=64, positions=32), r"`positions` \(32\) must be at least `length`"),
    (dict(length=8, masked=9), r"`masked` \(9\) must be at most `length` \(8\)"),
    (dict(glue_task="sst2"), r"`glue_task` \(sst2\) has no effect on `task` \(mlm\)"),
    (dict(task="glue", masked=3), r"`masked` \(3\) has no effect on `task` \(glue\)"),
    (dict(mode="predict", saved_model="export", input="lines.txt"),
     r"`saved_model` \(export\) needs the vocabulary .*\nGive .*--vocab=<vocab.txt>"),
    (dict(glue_task="qnli"), r"`glue_task` \(qnli\) must be python, sst2, cola or m"),
])
def test_bad_settings_are_named(change, message):
    with pytest.raises(mpl.ConfigError, match=message):
        bert.Config(**change)


@pytest.mark.parametrize("change", [
    dict(vocab="vocab.txt"), dict(data_dir="data"), dict(input="ids.npz")])
def test_an_export_is_asked_by_a_vocabulary_that_is_named(change):
    given = dict(mode="predict", saved_model="export", input="lines.txt")
    config = bert.Config(**{**given, **change})
    assert config.saved_model == "export"


def test_folders_that_lack_something(strategy_of, tmp_path):
    with pytest.raises(mpl.ConfigError, match="no vocabulary .*vocab.txt.\nName BERT"):
        prepared(strategy_of(1), data_dir=str(tmp_path))
    write_vocabulary(tmp_path)
    with pytest.raises(mpl.ConfigError, match=r"neither train\*.tfrecord\* nor train"):
        prepared(strategy_of(1), data_dir=str(tmp_path))
    with pytest.raises(mpl.ConfigError, match=r"Split train: `glue_task` \(mrpc\) and"):
        prepared(strategy_of(1), task="glue", glue_task="mrpc", masked=10)


@pytest.mark.slow
def test_a_word_out_of_range_ends_the_run(tmp_path):
    settings = files_of("v1", tmp_path)
    vocabulary = (tmp_path / "vocab.txt").read_text().splitlines()[:-3]
    first_lines(tmp_path / "vocab.txt", vocabulary)
    with pytest.raises(mpl.ConfigError) as error:
        run(train_steps=5, workdir=str(tmp_path / "run"), **settings)
    assert str(error.value).startswith(f"File {tmp_path}/train-0000")
    assert f"and must lie in 0 ... {len(vocabulary) - 1}." in str(error.value)
