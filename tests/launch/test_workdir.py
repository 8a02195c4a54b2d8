"""The folder of a run: found, made, described, gone on with."""

import dataclasses
import datetime
import os
import subprocess
import sys
import types

import pytest
from absl import logging

from mpl.errors import ConfigError
from mpl.launch import flags, workdir
from mpl.launch.config import RunConfig, merged
from mpl.launch.option import option

NOON = datetime.datetime(2024, 5, 6, 12, 0, 0)


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    train_epochs = 20
    hidden: int = option(64, "Units of the hidden layer.")


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The folder of all runs; it is noon."""
    monkeypatch.setattr(workdir, "RUNS", str(tmp_path / "runs"))
    clock = types.SimpleNamespace(datetime=types.SimpleNamespace(now=lambda: NOON))
    monkeypatch.setattr(workdir, "datetime", clock)
    return workdir.RUNS


def test_a_new_run_is_named_by_the_time_and_latest_points_to_it(runs):
    first = workdir.create(None, "digits")
    second = workdir.create(None, "digits")
    assert first == os.path.join(runs, "digits", "20240506-120000")
    assert second == first + "-1"
    assert os.readlink(os.path.join(runs, "digits", "latest")) == "20240506-120000-1"
    assert sorted(os.listdir(os.path.join(runs, "digits"))) == [
        "20240506-120000", "20240506-120000-1", "latest",
    ]  # fmt: skip


def test_a_folder_given_by_hand_may_exist_and_moves_no_link(tmp_path, runs):
    path = str(tmp_path / "a" / "b")
    assert workdir.create(path, "digits") == path
    assert workdir.create(path, "digits") == path
    assert os.path.isdir(path) and not os.path.exists(runs)


def test_finding_a_run(tmp_path, runs):
    def find(**settings):
        return workdir.find_run(RunConfig(**settings), "digits")

    assert find() is None  # training: a new run
    by_hand = str(tmp_path / "mine")
    assert find(workdir=by_hand) is None
    for settings in ({"resume": True}, {"mode": "eval"}, {"mode": "predict"},
                     {"mode": "export"}, {"mode": "eval", "workdir": by_hand},
                     {"resume": True, "workdir": by_hand}):  # fmt: skip
        with pytest.raises(ConfigError, match="needs a run of digits") as caught:
            find(**settings)
        assert "--mode=train_and_eval" in caught.value.remedy
    made = workdir.create(None, "digits")
    workdir.write_flagfile(made, RunConfig())
    assert find() is None
    assert find(resume=True) == find(mode="eval") == made
    workdir.write_flagfile(workdir.create(by_hand, "digits"), RunConfig())
    assert find(workdir=by_hand) == find(workdir=by_hand, mode="eval") == by_hand


def test_a_run_of_another_experiment_is_refused_by_name(tmp_path):
    path = str(tmp_path)
    facts = {"experiment": "digits"}
    workdir.write_flagfile(path, RunConfig(), facts)
    assert workdir.read_facts(path) == facts
    for mode in ("train", "eval"):
        config = RunConfig(workdir=path, mode=mode)
        assert workdir.find_run(config, "digits") == path
        with pytest.raises(ConfigError, match="a run of digits, not of gan_digits"):
            workdir.find_run(config, "gan_digits")


def test_checkpoints_without_a_flagfile_warn(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(
        logging, "warning", lambda text, *values: lines.append(text % values)
    )
    config = RunConfig(workdir=str(tmp_path))
    assert workdir.find_run(config, "digits") is None and lines == []
    (tmp_path / "checkpoints").mkdir()
    assert workdir.find_run(config, "digits") is None
    assert lines == [f"{tmp_path} has checkpoints, but no flagfile.txt to check"]


@pytest.mark.slow
def test_two_processes_cannot_train_in_one_folder(tmp_path):
    code = "import sys, mpl.launch.workdir as w; w.lock(sys.argv[1]); print('held')"
    command = [sys.executable, "-c", code, str(tmp_path)]
    assert workdir.is_free(str(tmp_path)) and not workdir.is_free("gs://bucket/run")
    assert not workdir.is_free(str(tmp_path / "none"))
    with workdir.lock(str(tmp_path)):
        assert not workdir.is_free(str(tmp_path))
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
            workdir.lock(str(tmp_path))
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        run = subprocess.run(command, capture_output=True, env=env, text=True)
        assert f"in use by process {os.getpid()}" in run.stderr
    run = subprocess.run(command, capture_output=True, env=env, text=True)
    assert run.stdout == "held\n"  # and not let go
    workdir.lock(str(tmp_path)).close()
    assert workdir.lock("gs://bucket/run") is not None


def test_an_unwritable_folder_is_refused_and_nothing_is_left(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for path in (file, file / "below" / "it"):
        with pytest.raises(ConfigError, match="`workdir` .* must be a folder"):
            workdir.check_writable(str(path))
        with pytest.raises(ConfigError, match="`workdir` .* must be a folder"):
            workdir.create(str(path), "digits")
    workdir.check_writable(str(tmp_path / "new" / "deep"))
    assert os.listdir(tmp_path) == ["file"] and file.read_text() == "mine"


def test_a_folder_in_the_place_of_the_link_is_an_error(runs):
    os.makedirs(os.path.join(runs, "digits", "latest"))
    with pytest.raises(ConfigError, match="must be a folder that takes files"):
        workdir.create(None, "digits")


def test_the_flagfile_repeats_the_run_without_its_folder(tmp_path):
    config = merged(Config, {}, dict(
        train_steps=7, hidden=3, learning_rate=1e-5, mode="predict", data_dir="d",
        workdir="x", resume=True, allow_changed_flags=True, input="i", output="o",
    ))  # fmt: skip
    path = workdir.write_flagfile(str(tmp_path), config, {"experiment": "digits"})
    assert os.listdir(tmp_path) == ["flagfile.txt"]
    again = merged(Config, {}, flags.parse(Config, ["program", f"--flagfile={path}"]))
    assert again == dataclasses.replace(
        config, workdir=None, resume=False, allow_changed_flags=False, input=None,
        output=None,
    )  # fmt: skip


def record_of(tmp_path, **settings):
    workdir.write_flagfile(str(tmp_path), merged(Config, {}, settings))
    return workdir.read_flagfile(str(tmp_path))


def test_going_on_keeps_what_the_command_does_not_give(tmp_path, capsys):
    record = record_of(tmp_path, hidden=3, train_steps=7, policy="float32", mode="all")
    given = {"policy": "auto", "hidden": 3}
    config = workdir.go_on(Config, record, {"hidden": 5}, given)
    assert (config.hidden, config.train_steps, config.train_epochs) == (3, 7, None)
    assert (config.policy, config.mode) == ("float32", "train_and_eval")
    assert capsys.readouterr().out == ""


def changes_in(capsys):
    lines = capsys.readouterr().out.splitlines()
    return [line.removeprefix("Changed since the run began: ") for line in lines]


def test_changes_are_listed_and_those_of_the_mathematics_need_leave(tmp_path, capsys):
    record = record_of(tmp_path, train_steps=7)
    given = {"train_steps": 9, "log_every_steps": 3}
    config = workdir.go_on(Config, record, {}, given)
    assert changes_in(capsys) == ["train_steps 7 -> 9", "log_every_steps none -> 3"]
    assert config.train_steps == 9

    given = {"seed": 1, "hidden": 2, "num_devices": 2}
    with pytest.raises(ConfigError) as caught:
        workdir.go_on(Config, record, {}, given)
    assert caught.value.cause.endswith("the run's: seed 0 -> 1; hidden 64 -> 2.")
    assert "--allow_changed_flags" in caught.value.remedy
    given["allow_changed_flags"] = True
    assert workdir.go_on(Config, record, {}, given).hidden == 2
    assert len(changes_in(capsys)) == 3
    given |= {"mode": "eval", "allow_changed_flags": False}
    workdir.go_on(Config, record, {}, given)
    assert len(changes_in(capsys)) == 3


def test_the_length_matters_to_a_schedule(tmp_path):
    record = record_of(tmp_path, train_epochs=2, lr_schedule="cosine")
    with pytest.raises(ConfigError, match="train_epochs 2 -> 3"):
        workdir.go_on(Config, record, {}, {"train_epochs": 3})


def test_a_flag_that_exists_no_more_is_a_change(tmp_path):
    record = {**record_of(tmp_path), "depth": "3"}
    with pytest.raises(ConfigError, match="depth 3 -> .no such flag."):
        workdir.go_on(Config, record, {}, {})
