"""From an experiment class to a finished run: checks, exit codes, the process."""

import contextlib
import dataclasses
import os
import subprocess
import sys
import types

import pytest
import tensorflow as tf

from mpl.errors import CheckpointError, ConfigError
from mpl.experiment import Experiment
from mpl.launch import app, workdir
from mpl.launch.config import RunConfig
from mpl.launch.option import option


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    train_epochs = 2
    hidden: int = option(4, "Units.", minimum=1)


class Fake(Experiment):
    """An experiment of which nothing is built."""

    Config = Config

    def metrics(self):
        return {"accuracy": None}

    def headline(self):
        return "accuracy"


def fake(**settings):
    experiment = Fake()
    experiment.config = Config(**settings)
    experiment.evaluators = {"validation": None, "test": None}
    experiment.train_steps, experiment.batches_per_epoch = 20, 10
    experiment.num_examples, experiment.pipelines = {"train": 640}, {}
    return experiment


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_outside_a_script_keyword_arguments_are_the_settings(monkeypatch):
    calls = []
    monkeypatch.setattr(app, "execute", lambda *args: calls.append(args))
    monkeypatch.setattr(sys, "argv", ["notebook", "--bogus"])
    app.run(Fake, seed=3)
    assert calls == [(Fake, {}, {"seed": 3})]


def test_in_a_script_the_command_line_is_read(monkeypatch):
    calls = []
    monkeypatch.setattr(app, "run_program", lambda *args: calls.append(args))
    monkeypatch.setattr(sys, "argv", ["script", "--seed=1"])
    monkeypatch.setattr(Fake, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "script.py", raising=False)
    app.run(Fake, seed=3)
    assert calls == [(Fake, {"seed": 3}, ["script", "--seed=1"])]
    monkeypatch.delattr(sys.modules["__main__"], "__file__")  # a notebook
    monkeypatch.setattr(app, "execute", lambda *args: calls.append(args))
    app.run(Fake, seed=3)
    assert calls[1:] == [(Fake, {}, {"seed": 3})]


def program(monkeypatch, *arguments, execute=None):
    """Runs the fake as a program whose `execute` returns its arguments."""
    monkeypatch.setattr(app, "execute", execute or (lambda *args: {"args": args}))
    return app.run_program(Fake, {"seed": 3}, ["program", *arguments])


def test_a_program_returns_the_results(monkeypatch):
    _, defaults, given, start = program(monkeypatch, "--hidden=5")["args"]
    assert (defaults, given) == ({"seed": 3}, {"hidden": 5})
    assert start == app.program()


@pytest.mark.parametrize(
    "arguments, cause",
    [
        (["--hiden=5"], "`--hiden` is no flag"),
        (["--hidden=0"], "`hidden` (0) must be an integer at least 1"),
        (["--train_steps=5", "--train_epochs=5"], "say the same thing"),
        (["--policy=float31"], "`policy` (float31)"),
    ],
)
def test_a_wrong_flag_ends_with_code_2_and_two_lines(
    monkeypatch, capsys, arguments, cause
):
    with pytest.raises(SystemExit) as caught:
        program(monkeypatch, *arguments)
    lines = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and len(lines) == 2 and cause in lines[0]


def failing(error):
    def execute(*args):
        raise error

    return execute


def test_an_error_of_mpl_ends_with_code_1_and_two_lines(monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        program(monkeypatch, execute=failing(CheckpointError("cause.", "remedy.")))
    assert caught.value.code == 1
    assert capsys.readouterr().err == "cause.\nremedy.\n"


def test_other_errors_keep_their_traceback_and_ctrl_c_has_its_code(monkeypatch):
    with pytest.raises(KeyError, match="mine"):
        program(monkeypatch, execute=failing(KeyError("mine")))
    with pytest.raises(SystemExit) as caught:
        program(monkeypatch, execute=failing(KeyboardInterrupt()))
    assert caught.value.code == 130


def test_help_ends_the_program_with_code_0(monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        program(monkeypatch, "--help")
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert "--seed=3" in out and "--hidden=4" in out and "Of Config:" in out


def test_the_command_that_started_the_process(monkeypatch):
    main = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "executable", os.path.abspath(".venv/bin/python"))
    main.__spec__ = types.SimpleNamespace(name="experiments.digits")
    assert app.program() == ".venv/bin/python -m experiments.digits"
    main.__spec__ = types.SimpleNamespace(name="package.__main__")
    assert app.program() == ".venv/bin/python -m package"
    main.__spec__ = None
    monkeypatch.setattr(sys, "argv", [os.path.abspath("a b.py")])
    assert app.program() == ".venv/bin/python 'a b.py'"
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    assert app.program() == "/usr/bin/python3 'a b.py'"


def test_checks_before_anything_is_built(tmp_path):
    (tmp_path / "file").write_text("mine")
    check = app.check_before
    with pytest.raises(ConfigError, match="`workdir` .* must be a folder"):
        check(fake(), Config(workdir=str(tmp_path / "file")), None)
    with pytest.raises(ConfigError, match="`data_dir` .* must be a folder"):
        check(fake(), Config(data_dir=str(tmp_path / "none")), None)
    with pytest.raises(ConfigError, match="needs `Fake.predict`"):
        check(fake(), Config(mode="all"), None)
    check(fake(), Config(data_dir=str(tmp_path)), None)
    assert os.listdir(tmp_path) == ["file"]


def test_checks_once_the_data_are_known():
    with pytest.raises(ConfigError, match="validation data: accuracy, loss"):
        app.check_after(fake(), Config(early_stop="acuracy:1"), {})
    app.check_after(fake(), Config(early_stop="loss:1"), {})
    blind = fake()
    del blind.evaluators["validation"]
    with pytest.raises(ConfigError, match="validation data: there are none"):
        app.check_after(blind, Config(early_stop="loss:1"), {})
    with pytest.raises(ConfigError, match="`mode` .eval. needs validation data"):
        app.check_after(blind, Config(mode="eval"), {})
    app.check_after(blind, Config(), {})


class Recorded(Fake):
    """Stands for an experiment whose set-up fails or succeeds."""

    error = None

    def setup(self, config, strategy):
        if self.error is not None:
            raise self.error
        vars(self).update(vars(fake()), config=config, strategy=strategy)
        self.eagerly = tf.config.functions_run_eagerly()
        self.policy = types.SimpleNamespace(name="mixed_bfloat16")


@pytest.fixture
def sessions(monkeypatch):
    made = []

    class Session:
        def __init__(self, *args):
            made.append(args)

        def go(self):
            experiment, path = made[-1][:2]
            if experiment.config.mode in app.TRAINING_MODES:  # as it does
                facts = workdir.facts_of(experiment)
                workdir.write_flagfile(path, experiment.config, facts)
            return {"test": {"accuracy": 1.0}}

    monkeypatch.setattr(app, "Session", Session)
    monkeypatch.setattr(app, "watching", lambda *_: contextlib.nullcontext())
    return made


def test_a_new_run_has_its_folder_and_flags(sessions):
    results = app.execute(Recorded, {"hidden": 7}, {"train_steps": 5}, "start")
    assert results == {"test": {"accuracy": 1.0}}
    experiment, path, start, record = sessions[0]
    assert (start, record) == ("start", None)
    assert os.path.samefile(path, "runs/recorded/latest")
    written = workdir.read_flagfile(path)
    assert written["hidden"] == "7"
    assert (written["train_steps"], written["train_epochs"]) == ("5", "none")


def test_another_number_of_examples_needs_leave(monkeypatch, sessions, capsys):
    app.execute(Recorded, {}, {"workdir": "w"})
    monkeypatch.setattr(workdir, "facts_of", lambda _: {"training examples": "641"})
    with pytest.raises(ConfigError, match="training examples 640 -> 641"):
        app.execute(Recorded, {}, {"workdir": "w"})
    app.execute(Recorded, {}, {"workdir": "w", "allow_changed_flags": True})
    change = "Changed since the run began: training examples 640 -> 641"
    assert change in capsys.readouterr().out


def test_a_folder_in_use_is_refused_to_training_alone(sessions):
    app.execute(Recorded, {}, {"workdir": "w"})
    with workdir.lock("w"):
        with pytest.raises(ConfigError, match="in use by process"):
            app.execute(Recorded, {}, {"workdir": "w"})
        app.execute(Recorded, {}, {"workdir": "w", "mode": "eval"})
    app.execute(Recorded, {}, {"workdir": "w"})
    assert len(sessions) == 3


def test_a_program_leaves_out_notes_of_tensorflow(monkeypatch):
    tf.get_logger().setLevel("INFO")
    program(monkeypatch)
    assert not tf.get_logger().isEnabledFor(20) and tf.get_logger().isEnabledFor(30)


def test_nothing_is_written_when_the_set_up_fails(monkeypatch, sessions):
    monkeypatch.setattr(Recorded, "error", ConfigError("cause.", "remedy."))
    with pytest.raises(ConfigError, match="cause"):
        app.execute(Recorded, {}, {"debug_eager": True})
    assert os.listdir() == [] and not tf.config.functions_run_eagerly()


def test_a_run_goes_on_and_says_what_changed(sessions, capsys):
    app.execute(Recorded, {}, {"workdir": "w", "train_steps": 5, "hidden": 7})
    app.execute(Recorded, {}, {"workdir": "w", "train_steps": 9})
    assert "Changed since the run began: train_steps 5 -> 9" in capsys.readouterr().out
    experiment, path, _, record = sessions[1]
    assert (path, record["train_steps"], experiment.config.hidden) == ("w", "5", 7)
    assert workdir.read_flagfile("w")["train_steps"] == "9"
    with pytest.raises(ConfigError, match="hidden 7 -> 8"):
        app.execute(Recorded, {}, {"workdir": "w", "hidden": 8})
    # Evaluation reads the run and leaves its record alone.
    app.execute(Recorded, {}, {"workdir": "w", "mode": "eval", "num_devices": 1})
    assert workdir.read_flagfile("w")["num_devices"] == "none"
    assert sessions[2][0].config.train_steps == 9


def test_eager_mode_ends_with_the_run(sessions):
    app.execute(Recorded, {}, {"debug_eager": True})
    assert sessions[0][0].eagerly and not tf.config.functions_run_eagerly()


SCRIPT = """
import mpl

class Digit(mpl.Experiment):
    'Never built.'

    def setup(self, config, strategy):
        raise mpl.ConfigError("cause.", "remedy.")

mpl.run(Digit, global_batch_size=3)
print("not reached")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, code, out, err",
    [
        (["--help"], 0, "--global_batch_size=3", None),
        (["--sed=1"], 2, "", "Did you mean --seed? --helpfull lists all."),
        ([], 1, "", "remedy."),
    ],
)
def test_a_script_as_a_process(tmp_path, arguments, code, out, err):
    (tmp_path / "digit.py").write_text(SCRIPT)
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    run = subprocess.run(
        [sys.executable, "digit.py", *arguments], capture_output=True, text=True,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, check=False,
    )  # fmt: skip
    assert run.returncode == code and "Traceback" not in run.stderr
    assert out in run.stdout and "not reached" not in run.stdout
    assert err is None or run.stderr.splitlines()[-1] == err
