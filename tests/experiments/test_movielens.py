"""Matrix factorisation: its formula, its tables, its runs, and that it learns."""

import pathlib
import time

import numpy as np
import pytest
import tensorflow as tf

import mpl
from experiments import movielens
from experiments.datasets import movielens as data
from experiments.models.factorization import factorization

POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")
SMALL = {"users": 40, "items": 30, "ratings": 500, "global_batch_size": 16}


def prepared(strategy, **settings):
    experiment = movielens.Movielens()
    experiment.setup(movielens.Config(**settings), strategy)
    return experiment


def real_folder(folder):
    """Writes 200 ratings in the layout of MovieLens 1M; returns its folder."""
    random = np.random.default_rng(0)
    rows = zip(  # user, item, rating
        random.integers(1, 9, 200), random.integers(1, 3953, 200),
        random.integers(1, 6, 200))
    folder.mkdir()
    (folder / "ratings.dat").write_text(
        "".join("::".join(map(str, row)) + "::978300760\n" for row in rows))
    return str(folder)


@pytest.mark.parametrize("units", [(), (6, 3)])
def test_the_model_is_its_formula(units):
    model = factorization(5, 7, 4, 3.5, units)
    random = np.random.default_rng(0)
    w = {weight.path: random.normal(size=weight.shape) for weight in model.weights}
    for weight in model.weights:
        weight.assign(w[weight.path])
    user, item = np.array([1, 4, 1], np.int32), np.array([6, 0, 2], np.int32)

    def rows(name):
        return (w[f"user_{name}/embeddings"][user], w[f"item_{name}/embeddings"][item])

    (p, q), (of_user, of_item) = rows("factors"), rows("bias")
    score = 3.5 + of_user[:, 0] + of_item[:, 0] + (p * q).sum(1)
    read = [p, q, of_user, of_item]
    if units:
        read += rows("mlp")
        x = np.concatenate(rows("mlp"), 1)
        dense = [layer for layer in model.layers if "dense" in layer.name]
        for layer in dense[:-1]:
            x = np.maximum(x @ w[layer.kernel.path] + w[layer.bias.path], 0)
        score += (x @ w[dense[-1].kernel.path])[:, 0]
        assert [layer.units for layer in dense] == [6, 3, 1]
    got_score, got_length = model([user, item])
    np.testing.assert_allclose(got_score, score, rtol=1e-4)
    np.testing.assert_allclose(
        got_length, (np.concatenate(read, 1) ** 2).sum(1), rtol=1e-4)


def test_the_loss_is_squared_error_and_penalty(strategy_of):
    experiment = prepared(strategy_of(1), policy="float32", penalty=0.25, **SMALL)
    batch = {"user": tf.constant([3, 9]), "item": tf.constant([5, 5]),
             "rating": tf.constant([4.0, 1.0]), "weight": tf.constant([1.0, 0.0])}
    score, length = experiment.model([batch["user"], batch["item"]])
    output = experiment.loss(batch, training=False)
    np.testing.assert_allclose(
        output.per_example, [(4 - score[0]) ** 2 + 0.25 * length[0],
                             (1 - score[1]) ** 2 + 0.25 * length[1]], rtol=1e-6)
    experiment.eval_metrics.update(output)  # the second rating has no weight
    rmse = experiment.eval_metrics.result()["synthetic_rmse"]
    np.testing.assert_allclose(rmse, abs(4 - score[0]), rtol=1e-6)


@pytest.mark.parametrize("text", ["64;32", "64,", "0", "-8", "64,x"])
def test_units_that_are_none_are_refused(text):
    with pytest.raises(mpl.ConfigError, match="must be the units of layers"):
        movielens.Config(mlp=text)
    assert movielens.units_of("64,32") == [64, 32] and movielens.units_of(None) == []


def test_sizes_of_synthetic_data_do_not_go_with_real_ones(tmp_path):
    with pytest.raises(mpl.ConfigError, match="`items` is of synthetic data, and"):
        movielens.Config(items=4, data_dir=str(tmp_path))


def test_real_ratings_have_rows_up_to_the_highest_id(strategy_of, tmp_path, capsys):
    experiment = prepared(strategy_of(1), data_dir=real_folder(tmp_path / "ml"),
                          policy="float32", global_batch_size=16)
    ratings = data.read(str(tmp_path / "ml" / "ratings.dat"))
    tables = {weight.path: weight.shape for weight in experiment.model.weights}
    assert tables["user_factors/embeddings"] == (9, 8)
    assert tables["item_factors/embeddings"] == (ratings["item"].max() + 1, 8)
    assert experiment.mean == pytest.approx(
        data.split(ratings)["train"]["rating"].mean(), rel=1e-6)
    assert experiment.num_examples == {"train": 160, "validation": 20, "test": 20}
    assert list(experiment.metrics()) == ["rmse"]
    said = capsys.readouterr().out
    assert "Data: 200 ratings of " in said and "ratings.dat, user ids to 8" in said
    assert "synthetic" not in said
    experiment.trainer.train(2)
    assert experiment.train_report()["applied_steps"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("sizes, tables", [
    (SMALL, 0), ({**SMALL, "users": 20_000, "factors": 16, "mlp": "8"}, 2)])
def test_two_steps_in_each_policy(sizes, tables, policy, replicas, strategy_of):
    experiment = prepared(strategy_of(replicas), policy=policy, **sizes)
    kinds = [bucket.kind.sparse for bucket in experiment.weights.buckets]
    assert sum(kinds) == tables  # by the row: p and p', of 20,000 users
    experiment.trainer.train(2)
    values = experiment.evaluators["validation"].evaluate(-1)
    assert np.isfinite(float(values["synthetic_rmse"]))
    report = experiment.train_report()
    assert report["applied_steps"] == 2 and report["grad_norm"] > 0


@pytest.mark.slow
def test_two_replicas_train_as_one_does(strategy_of):
    outcomes = []
    for replicas in (1, 2):
        experiment = prepared(
            strategy_of(replicas), policy="float32", factors=16, optimizer="sgd",
            learning_rate=0.1, **{**SMALL, "users": 20_000})
        experiment.trainer.train(30)
        outcomes.append({key: np.asarray(value) for key, value in
                         experiment.weights.by_key().items()})
    for key, want in outcomes[0].items():
        np.testing.assert_allclose(outcomes[1][key], want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_run_resumes_exports_and_predicts(tmp_path, capsys):
    """Of real data, by row: 3,953 films of 32 factors are 500 KB."""
    settings = dict(
        data_dir=real_folder(tmp_path / "ml"), workdir=str(tmp_path / "run"),
        factors=32, global_batch_size=16, policy="mixed_bfloat16",
        strategy="one_device", lr_schedule="constant")
    mpl.run(movielens.Movielens, train_steps=4, **settings)
    mpl.run(movielens.Movielens, train_steps=8, mode="all", **settings)
    said = capsys.readouterr().out
    assert "Going on at step 4 of 8" in said and "movielens: rmse " in said
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("userId,movieId\n1,3000\n8,7\n")
    for number, source in enumerate([
            {"workdir": settings["workdir"]},
            {"saved_model": str(tmp_path / "run" / "export")}]):
        mpl.run(movielens.Movielens, mode="predict", input=str(pairs),
                output=str(tmp_path / f"{number}.npz"), **source)
    first, second = (np.load(tmp_path / f"{n}.npz")["rating"] for n in range(2))
    assert first.shape == (2,) and (np.abs(first - 3) < 2).all()
    np.testing.assert_allclose(second, first, atol=0.02)  # float32 of bfloat16
    pairs.write_text("userId,movieId\n9,1\n")
    with pytest.raises(mpl.ConfigError, match="user from 1 to 8 .* in line 2: '9,1'"):
        mpl.run(movielens.Movielens, mode="predict", input=str(pairs),
                workdir=settings["workdir"])


@pytest.mark.slow
def test_every_line_of_synthetic_figures_says_so(tmp_path, capsys):
    mpl.run(movielens.Movielens, train_steps=4, log_every_steps=2, eval_every_steps=2,
            workdir=str(tmp_path), strategy="one_device", **SMALL)
    said = capsys.readouterr().out
    assert "Data: 500 synthetic ratings (no --data_dir) of rank 4, noise 0.4" in said
    figures = [line for line in said.splitlines() if "loss" in line]
    figures += (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(figures) > 8 and all("synthetic_rmse" in line for line in figures)


@pytest.mark.slow
@pytest.mark.parametrize("mlp, policy", [
    *((None, policy) for policy in POLICIES), ("64,32", "mixed_bfloat16")])
def test_planted_factors_are_recovered(mlp, policy, strategy_of):
    """Of the noise 5 % at most are added; and the matrix without it is found."""
    experiment = prepared(strategy_of(1), policy=policy, mlp=mlp)
    experiment.trainer.train(experiment.train_steps)
    rmse = float(experiment.evaluators["test"].evaluate(-1)["synthetic_rmse"])
    ratings, clean = data.synthetic(*movielens.SIZES.values())
    test, want = (data.split({**ratings, "rating": values})["test"]
                  for values in (ratings["rating"], clean))
    floor = np.sqrt(np.mean((test["rating"] - want["rating"]) ** 2))
    print(f"{policy}: rmse {rmse:.4f}, noise {floor:.4f}")
    assert rmse <= 1.05 * floor and abs(floor - data.NOISE) < 0.005
    got = experiment.predictor()(test)["rating"]
    error = np.sqrt(np.mean((got - want["rating"]) ** 2))
    print(f"of the matrix {error / want['rating'].std():.4f} is missed")
    assert error < 0.2 * want["rating"].std()


def _status(name):
    """Returns a line of /proc/self/status in bytes."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(x.split()[1]) for x in lines if x.startswith(name))


@pytest.mark.slow
def test_a_table_of_a_million_rows_costs_by_rows_touched(strategy_of):
    """A step on 10⁶ × 32 numbers, with Adam, beside one on 10⁴ × 32."""
    million, less = (
        prepared(strategy_of(1), policy="float32", users=users, factors=32,
                 ratings=100_000, jit_compile=False) for users in (10**6, 10**4))
    table = next(bucket for bucket in million.weights.buckets
                 if bucket.entries[0].name == "user_factors/embeddings")
    assert table.kind.sparse and table.variable.shape[0] > 999_000

    def secs(experiment):
        start = time.perf_counter()
        experiment.trainer.train(50)
        experiment.global_step.numpy()
        return time.perf_counter() - start

    for experiment in (million, less):
        secs(experiment)  # traces
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    times = [(secs(million), secs(less)) for _ in range(5)]
    grown = _status("VmHWM") - before
    of_million, of_less = np.min(times, 0)
    print(f"ms a step: {20 * of_million:.2f} of 10⁶ rows, {20 * of_less:.2f} of 10⁴; "
          f"{grown / 1e6:.1f} MB more")
    assert of_million < 3 * of_less
    assert grown < 32e6 < 128e6 == 10**6 * 32 * 4
