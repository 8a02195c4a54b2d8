"""Pages name flags that there are, and commands that are read; the quick ones run."""

import os
import re
import subprocess
import sys

import doc_pages
import pytest
import tensorflow as tf

import mpl
from mpl.launch.config import RunConfig

PAGES = ("precision.md", "many_devices.md", "port_from_keras_fit.md",
         "port_from_orbit.md", "troubleshooting.md", "faq.md")
# Of the launcher and of mpl.tools.compare.
OTHERS = {"workers", "ps", "policies", "seeds", "helpfull"}


@pytest.mark.parametrize("name", PAGES)
def test_flags_and_names_exist(name):
    text = doc_pages.page(name)
    flags = set(re.findall(r"--(\w+)", text)) - OTHERS
    assert [flag for flag in flags if not hasattr(RunConfig, flag)] == []
    for dotted in re.findall(r"`mpl\.([A-Za-z_]+)", text):
        assert hasattr(mpl, dotted) or dotted in ("launch", "tools"), dotted


@pytest.mark.parametrize("name", PAGES)
def test_commands_are_read(name):
    for words in doc_pages.commands(doc_pages.page(name)):
        kind, settings = doc_pages.run_of(words[words.index("--") + 1:]
                                          if "--" in words else words)
        assert kind.__name__ == "Digits"
        (kind.Config or RunConfig)(**{"train_epochs": None, **settings})


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(words, **more):
        kind, settings = doc_pages.run_of(words)
        return mpl.run(kind, **settings, summary_every_steps=0, **more)

    return run


@pytest.mark.slow
def test_many_devices_and_one_run(run, capsys):
    commands = doc_pages.commands(doc_pages.page("many_devices.md"))
    one, two, *_, larger = commands
    run(one)
    assert "OneDeviceStrategy, 1 replica on CPU 0" in capsys.readouterr().out
    accuracy = run(two)["test"]["accuracy"]
    printed = capsys.readouterr().out
    assert "MirroredStrategy, 2 replicas on CPU 0, 1" in printed
    assert "Going on at step 40 of 80 in runs/digits" in printed
    assert accuracy > 0.5
    assert "test" in run(larger)
    assert "MirroredStrategy, 2 replicas" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("ps", [0, 1])
def test_many_devices_and_processes(ps, tmp_path):
    (words,) = [words for words in doc_pages.commands(
        doc_pages.page("many_devices.md")) if "mpl.launch.local" in words
        and ("--ps=1" in words) == bool(ps)]
    words = [sys.executable if word == "python" else word for word in words]
    environ = {**os.environ, "PYTHONPATH": str(doc_pages.ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=environ, timeout=300, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    who = "chief 0" if ps else "worker 0"
    assert f"[{who}] digits: accuracy 0." in done.stdout
    kind = "ParameterServer" if ps else "MultiWorkerMirroredStrategy, 2 replicas"
    assert kind in done.stdout


@pytest.mark.slow
def test_questions_of_going_on(run, capsys):
    """The commands of the page that go on, and another batch size, on one run."""
    commands = doc_pages.commands(doc_pages.page("faq.md"))
    (stops,) = [words for words in commands if "--early_stop=accuracy:5" in words]
    longer, other_rate = [words for words in commands if "--resume" in words]
    steps = {"train_steps": 20}
    run(stops, **steps)
    assert "Early stopping looks for the maximum of validation accuracy" in (
        capsys.readouterr().out)
    kind, settings = doc_pages.run_of(longer)
    with pytest.raises(mpl.ConfigError, match="What changes the mathematics differs"):
        mpl.run(kind, **{**settings, "allow_changed_flags": False, "train_epochs": 2})
    mpl.run(kind, **{**settings, "train_epochs": 2}, summary_every_steps=0)
    printed = capsys.readouterr().out
    assert "Going on at step 20 of 40 in runs/digits/" in printed
    run(other_rate, train_steps=50)
    printed = capsys.readouterr().out
    assert "Changed since the run began: learning_rate 0.002 -> 0.0001" in printed
    run(other_rate, train_steps=60, global_batch_size=128)
    printed = capsys.readouterr().out
    assert "global_batch_size 64 -> 128" in printed
    assert "Going on at step 50 of 60" in printed


@pytest.mark.slow
def test_fewer_bytes(run):
    (words,) = doc_pages.commands(doc_pages.page("troubleshooting.md"))
    results = run(words, mode="train")
    assert results["train"]["applied_steps"] == 10


def test_a_page_s_own_optimizer():
    names, count = doc_pages.executed("faq.md", {"__name__": "page"})
    assert count == 1
    experiment = names["Mine"]()
    experiment.setup(names["Digits"].Config(policy="float32"),
                     tf.distribute.OneDeviceStrategy("CPU:0"))
    assert type(experiment.optimizer.inner).__name__ == "Lion"
    assert experiment.optimizer.inner.weight_decay == 0.01
    experiment.trainer.train(1)
    assert float(experiment.optimizer.learning_rate) == pytest.approx(0.002, rel=1e-4)
