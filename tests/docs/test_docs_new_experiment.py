"""What docs/new_experiment.md shows is what the tool writes, and runs."""

import pages
import pytest

import mpl
from mpl.tools import new

PAGE = "new_experiment.md"


@pytest.fixture(scope="module")
def page():
    return pages.names_of(PAGE)


def run(experiment, tmp_path, **settings):
    return mpl.run(experiment, workdir=str(tmp_path / "run"), summary_every_steps=0,
                   **{"policy": "float32", **settings})


def test_the_experiment_is_the_one_that_the_tool_writes():
    assert pages.blocks(PAGE, "python")[0] == new.FILES["my_experiment.py"]


def test_the_commands_are_those_that_the_tests_of_the_tool_run():
    assert pages.commands(PAGE)[:4] == [
        "python -m mpl.tools.new ../my_experiment", "cd ../my_experiment",
        "python my_experiment.py --mode=all", "python -m pytest"]


@pytest.mark.slow
def test_several_outputs(page, tmp_path):
    results = run(page["TwoHeads"], tmp_path, mode="all")
    assert results["test"]["accuracy"] > 0.95 and results["test"]["mae"] < 1
    predict = mpl.load_predictor(tmp_path / "run" / "export")
    examples = page["TwoHeads"]().build_data("test", None)
    predictions = predict({"point": examples["point"][:5]})
    assert predictions["cloud"].shape == (5, 3) and predictions["far"].shape == (5,)


def test_an_optimizer_of_ones_own(page, tmp_path):
    experiment = page["WithMomentum"]()
    inner = experiment.build_optimizer(page["MyExperiment"].Config(learning_rate=0.1))
    assert (inner.name, inner.momentum, inner.nesterov) == ("sgd", 0.9, True)
    results = run(page["WithMomentum"], tmp_path, train_steps=2, mode="train")
    assert results["train"]["learning_rate"] == pytest.approx(0.01)


def test_flags_and_a_rule_between_them(page):
    config = page["Config"]
    assert config(head="cosine").hidden == 32
    with pytest.raises(mpl.ConfigError) as caught:
        config(head="cosine", hidden=1)
    assert str(caught.value) == (
        "`hidden` (1) must be 2 or more with `head` cosine.\n"
        "Write for example --hidden=32.")
    with pytest.raises(mpl.ConfigError, match="must be dense or cosine"):
        config(head="sine")


@pytest.mark.slow
def test_the_commands_that_test_it(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    eager, half, two = pages.commands(PAGE)[-3:]
    assert pages.typed(eager, page["MyExperiment"])["train"]["applied_steps"] == 1
    results = pages.typed(half, page["MyExperiment"])
    assert results["train"]["loss_scale"] > 1
    capsys.readouterr()
    pages.typed(two, page["MyExperiment"])
    assert "2 replicas" in capsys.readouterr().out
