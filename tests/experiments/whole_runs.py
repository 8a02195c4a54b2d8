"""What each experiment does on a few examples, in any policy, on any devices."""

import numpy as np

import mpl

POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")


def two_steps(kind, strategy, **settings):
    """Trains two steps, in float16 with a fitting loss scale, and evaluates.

    Returns:
        The experiment.
    """
    if settings["policy"] == "mixed_float16":
        settings.setdefault("loss_scale", 1024.0)
    experiment = kind()
    experiment.setup(kind.Config(**settings), strategy)
    experiment.trainer.train(2)
    assert int(experiment.global_step) == 2
    report = experiment.train_report()
    assert report["applied_steps"] == 2 and report["skipped_steps"] == 0
    for evaluator in experiment.evaluators.values():
        values = evaluator.evaluate(-1)
        for name in ("loss", experiment.headline()):
            assert np.isfinite(float(values[name])), name
    return experiment


def run(kind, folder, **settings):
    """Runs in a folder; returns the results."""
    return mpl.run(kind, workdir=str(folder), summary_every_steps=0, **settings)


def predictions(folder):
    """Returns what a run has predicted."""
    with np.load(folder / "predictions.npz") as arrays:
        return arrays["predictions"]


def resumed(kind, folder, atol=1e-5, **settings):
    """Trains two steps, and in another start two more, in all modes.

    Checks that four steps without a stop predict the same bits, and that an export
    predicts what training does, but for `atol`.

    Returns:
        The results, and the predictions for the test data.
    """
    settings = {"train_epochs": None, "lr_schedule": "constant", **settings}
    run(kind, folder / "parts", mode="train", train_steps=2, **settings)
    results = run(kind, folder / "parts", mode="all", train_steps=4, **settings)
    whole = run(kind, folder / "whole", mode="all", train_steps=4, **settings)
    got, want = (predictions(folder / part) for part in ("parts", "whole"))
    np.testing.assert_array_equal(got, want)
    assert results["test"] == whole["test"]
    experiment = kind()
    experiment.config = kind.Config(**settings)
    test = experiment.build_data("test", mpl.DataContext(
        experiment.config.data_dir, experiment.config.global_batch_size, 0, None))
    export = mpl.load_predictor(folder / "parts" / "export")
    np.testing.assert_allclose(export(test), got, atol=atol)
    return results, got
