"""Illness: losses by hand, each task and kind of data, runs, and that it learns."""

import numpy as np
import pytest
import tensorflow as tf

import mpl
from experiments import medical
from experiments.datasets import lesions

POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")
SHAPES = {"image": (28, 28), "rgb": (28, 28, 3), "volume": (16, 16, 16)}
TASKS = {"binary": (2, 1), "multi_class": (4, 1), "multi_label": (2, 5)}


def prepared(strategy, **settings):
    settings = {"policy": "float32", "global_batch_size": 16, "filters": 4, **settings}
    experiment = medical.Medical()
    experiment.setup(medical.Config(**settings), strategy)
    return experiment


def folder_of(folder, shape="image", task="binary", count=32):
    """Writes a set in MedMNIST's layout, of any kind; returns its folder."""
    random, (classes, columns) = np.random.default_rng(0), TASKS[task]
    arrays = {}
    for split in ("train", "val", "test"):
        size = (count, *SHAPES[shape])
        arrays[f"{split}_images"] = random.integers(0, 256, size, np.uint8)
        labels = random.integers(0, classes, [count, columns], np.uint8)
        labels[:4] = np.arange(4)[:, np.newaxis] % classes  # all classes
        arrays[f"{split}_labels"] = labels
    folder.mkdir()
    np.savez_compressed(folder / f"{shape}mnist.npz", **arrays)
    return str(folder)


def batch_of(experiment, label):
    return {"label": tf.constant(label, tf.uint8), "weight": tf.ones([len(label)]),
            "image": tf.zeros([len(label), 28, 28, 1], tf.uint8)}


def losses_of(experiment, label, logits):
    """Returns the losses of labels, with these logits for a model's."""
    experiment.model = lambda inputs, training: tf.constant(logits, tf.float32)
    return experiment.loss(batch_of(experiment, label), training=True)


@pytest.mark.parametrize("weights", ["balanced", "none"])
def test_losses_by_hand(weights, strategy_of, tmp_path):
    def of_task(task):
        return prepared(strategy_of(1), class_weights=weights,
                        data_dir=folder_of(tmp_path / task, task=task))

    balanced = weights == "balanced"
    softplus = np.logaddexp(0, [2.0, -1.0])
    experiment = of_task("binary")
    without, with_label = np.squeeze(experiment.class_weights) if balanced else (1, 1)
    output = losses_of(experiment, [[0], [1]], [[2.0], [1.0]])
    np.testing.assert_allclose(
        output.per_example, softplus * [without, with_label], rtol=1e-5)
    np.testing.assert_array_equal(output.weights, [1, 1])
    np.testing.assert_allclose(output.outputs[1], [[0.880797], [0.731059]], rtol=1e-5)

    experiment = of_task("multi_class")
    of_class = experiment.class_weights[1] if balanced else np.ones(4)
    output = losses_of(experiment, [[0, 0, 1, 0]], [[0.0, 1.0, 2.0, 3.0]])
    want = np.log(np.exp([0, 1, 2, 3]).sum()) - 2
    np.testing.assert_allclose(output.per_example, [want * of_class[2]], rtol=1e-5)

    experiment = of_task("multi_label")
    table = experiment.class_weights if balanced else np.ones([2, 5])
    output = losses_of(experiment, [[0, 1, 0, 0, 0]], [[2.0, 1.0, 0.0, 0.0, 0.0]])
    want = [*softplus, np.log(2), np.log(2), np.log(2)]
    want *= np.where([0, 1, 0, 0, 0], table[1], table[0])
    np.testing.assert_allclose(output.per_example, [np.mean(want)], rtol=1e-5)


def test_balanced_weights_have_the_mean_1(strategy_of):
    experiment = prepared(strategy_of(1))
    label = lesions.load("train")["label"][:, 0]
    without, with_label = np.squeeze(experiment.class_weights)
    assert with_label > 1 > without  # the ill are fewer
    assert (np.where(label, with_label, without)).mean() == pytest.approx(1, abs=1e-5)
    assert without * (1 - label).sum() == pytest.approx(with_label * label.sum())


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_two_steps_on_each_kind_of_file(shape, task, strategy_of, tmp_path, capsys):
    folder = folder_of(tmp_path / "data", shape, task)
    experiment = prepared(strategy_of(1), data_dir=folder)
    said = capsys.readouterr().out
    assert f"{shape}mnist.npz: 32 training examples of " in said
    assert f"task {task}" in said and "synthetic" not in said
    experiment.trainer.train(2)
    values = experiment.evaluators["validation"].evaluate(-1)
    for name in ("loss", "auc", "sensitivity", "accuracy"):
        assert np.isfinite(float(values[name])), name
    assert experiment.train_report()["applied_steps"] == 2
    examples = medical.medmnist.load(f"{folder}/{shape}mnist.npz", "test")
    got = experiment.predictor()({"image": examples["image"]})["probability"]
    assert got.shape == (32, {"binary": 1, "multi_class": 4, "multi_label": 5}[task])
    assert (0 <= got).all() and (got <= 1).all()
    if task == "multi_class":
        np.testing.assert_allclose(got.sum(1), 1, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("task", ["binary", "multi_class"])
def test_two_steps_in_each_policy(task, policy, replicas, strategy_of, tmp_path):
    experiment = prepared(strategy_of(replicas), policy=policy,
                          data_dir=folder_of(tmp_path / "data", "image", task))
    experiment.trainer.train(2)
    values = experiment.evaluators["validation"].evaluate(-1)
    assert np.isfinite(float(values["auc"])) and np.isfinite(float(values["loss"]))
    report = experiment.train_report()
    assert report["applied_steps"] == 2 and report["grad_norm"] > 0


@pytest.mark.slow
def test_metrics_are_of_all_replicas(strategy_of, tmp_path):
    folder = folder_of(tmp_path / "data", "image", "multi_label", count=24)
    outcomes = []
    for replicas in (1, 2):
        experiment = prepared(strategy_of(replicas), data_dir=folder)
        values = experiment.evaluators["test"].evaluate(-1)
        outcomes.append({name: float(value) for name, value in values.items()})
    for name in ("loss", "auc", "sensitivity", "accuracy"):
        assert outcomes[1][name] == pytest.approx(outcomes[0][name], abs=1e-5)


@pytest.mark.parametrize("changes, message", [
    ({"dataset": "synthetic", "data_dir": "."}, "is not read from `data_dir`"),
    ({"task": "binary"}, "does not go with the labels of .*imagemnist.npz: 1 a rec"),
    ({"dataset": "pathmnist"}, "must name one .npz file"),
    ({"specificity": 1.0}, "`specificity`"),
    ({"dataset": "breast_cancer", "data_dir": None, "filters": 9},
     r"`filters` \(9\) has no effect on `dataset` \(breast_cancer\)"),
])
def test_settings_that_do_not_fit_are_refused(changes, message, strategy_of, tmp_path):
    folder = folder_of(tmp_path / "data", "image", "multi_class")
    with pytest.raises(mpl.ConfigError, match=message):
        prepared(strategy_of(1), **{"data_dir": folder, **changes})


def test_a_bad_label_of_another_split_is_named(strategy_of, tmp_path):
    folder = folder_of(tmp_path / "data", "image", "multi_class")
    path = f"{folder}/imagemnist.npz"
    with np.load(path) as file:
        arrays = dict(file)
    arrays["val_labels"][7] = 4
    np.savez_compressed(path, **arrays)
    with pytest.raises(mpl.ConfigError, match="Split validation: .*/imagemnist.npz: "
                       "record 7 has label 4, and must have 0 ... 3."):
        prepared(strategy_of(1), data_dir=folder)


@pytest.mark.slow
def test_a_run_resumes_exports_and_predicts(tmp_path, capsys):
    settings = dict(
        data_dir=folder_of(tmp_path / "data", "rgb", "multi_class"), filters=4,
        workdir=str(tmp_path / "run"), global_batch_size=16, policy="mixed_bfloat16",
        strategy="one_device", lr_schedule="constant")
    mpl.run(medical.Medical, train_steps=2, **settings)
    mpl.run(medical.Medical, train_steps=4, mode="all", **settings)
    said = capsys.readouterr().out
    assert "Going on at step 2 of 4" in said and "medical: auc " in said
    scans = tmp_path / "scans"
    scans.mkdir()
    for name, size in (("a.png", 28), ("b.png", 40)):
        pixels = np.full([size, size, 3], 90, np.uint8)
        (scans / name).write_bytes(tf.io.encode_png(pixels).numpy())
    for number, source in enumerate([
            {"workdir": settings["workdir"]},
            {"saved_model": str(tmp_path / "run" / "export")}]):
        mpl.run(medical.Medical, mode="predict", input=str(scans),
                output=str(tmp_path / f"{number}.npz"), **source)
    first, second = (np.load(tmp_path / f"{n}.npz")["probability"] for n in range(2))
    np.testing.assert_allclose(first.sum(1), [1, 1], atol=1e-5)
    np.testing.assert_allclose(first[0], first[1], atol=1e-6)  # the same, once resized
    np.testing.assert_allclose(second, first, atol=0.02)  # float32 of bfloat16


@pytest.mark.slow
def test_every_line_of_synthetic_figures_says_so(tmp_path, capsys):
    mpl.run(medical.Medical, train_steps=4, log_every_steps=2, eval_every_steps=2,
            workdir=str(tmp_path), strategy="one_device", filters=4)
    said = capsys.readouterr().out
    assert "Data: synthetic: 16,000 training examples of 28×28×1, task bin" in said
    figures = [line for line in said.splitlines() if "loss" in line]
    figures += (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(figures) > 8 and all("synthetic_auc" in line for line in figures)


@pytest.mark.slow
def test_volumes_of_the_default_train(strategy_of):
    experiment = prepared(strategy_of(1), dataset="synthetic_3d", global_batch_size=8)
    assert experiment.shape == (28, 28, 28, 1)
    experiment.trainer.train(2)
    assert experiment.train_report()["applied_steps"] == 2


@pytest.mark.slow
def test_known_factors_are_recovered(strategy_of):
    """The log odds that the model gives are those that the labels were drawn with."""
    experiment = medical.Medical()
    experiment.setup(
        medical.Config(policy="float32", class_weights="none"), strategy_of(1))
    experiment.trainer.train(experiment.train_steps)
    values = experiment.evaluators["test"].evaluate(-1)
    examples = lesions.load("test")
    probability = experiment.predictor()({"image": examples["image"]})["probability"]
    r, c = lesions.factors("test")
    odds = np.log(probability[:, 0]) - np.log1p(-probability[:, 0])
    design = np.stack([np.ones_like(r), r, c], 1)
    found = np.linalg.lstsq(design, odds, rcond=None)[0]
    metric = medical.ranking.AUC(1)
    best = 1 / (1 + np.exp(-lesions.log_odds(r, c)))
    metric.update_state(examples["label"], tf.constant(best[:, np.newaxis], tf.float32))
    auc, limit = float(values["synthetic_auc"]), float(metric.result())
    alike = np.corrcoef(odds, lesions.log_odds(r, c))[0, 1]
    print(f"found {found.round(2)}, like {alike:.4f}, auc {auc:.4f} of {limit:.4f}")
    planted = [lesions.INTERCEPT, lesions.RADIUS_EFFECT, lesions.CONTRAST_EFFECT]
    np.testing.assert_allclose(found, planted, rtol=0.25)
    assert alike > 0.95 and auc > limit - 0.02


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_tumours_are_told_apart(policy, strategy_of, tmp_path):
    pytest.importorskip("sklearn")
    experiment = prepared(
        strategy_of(1), policy=policy, dataset="breast_cancer", train_epochs=100,
        global_batch_size=32, filters=medical.Config.filters)
    experiment.trainer.train(experiment.train_steps)
    values = experiment.evaluators["test"].evaluate(-1)
    print({name: float(value) for name, value in values.items()})
    assert float(values["accuracy"]) >= 0.95 and float(values["auc"]) >= 0.99
    path = tmp_path / "tumours.csv"
    features = medical.breast_cancer.load("test")["features"]
    np.savetxt(path, features, delimiter=",")
    rows, = experiment.read_input(str(path))
    np.testing.assert_array_equal(rows["features"], features)
    predict = mpl.load_predictor(experiment.export(str(tmp_path / "export")))
    got, want = predict(rows), experiment.predictor()(rows)
    np.testing.assert_allclose(got["probability"], want["probability"], atol=0.05)
