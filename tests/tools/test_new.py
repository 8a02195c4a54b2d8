"""The project that the tool writes runs and tests itself; what is wrong is refused."""

import os
import pathlib
import shlex
import subprocess
import sys

import pytest

import mpl
from mpl.errors import ConfigError
from mpl.tools import new

ROOT = pathlib.Path(__file__).parents[2]
ENVIRON = {**os.environ, "PYTHONPATH": str(ROOT)}


def test_all_files_bear_the_name(tmp_path, capsys):
    assert new.main([str(tmp_path / "two_rings")]) == 0
    folder = tmp_path / "two_rings"
    names = ["README.md", "requirements.txt", "test_two_rings.py", "two_rings.py"]
    assert sorted(os.listdir(folder)) == names
    assert capsys.readouterr().out == (
        f"Wrote {', '.join(names)} in {folder}\n"
        f"Go on: cd {folder} && {sys.executable} two_rings.py --mode=all\n")
    for name in names:
        text = (folder / name).read_text(encoding="utf-8")
        assert "my_experiment" not in text.lower() and "MyExperiment" not in text
        assert max(map(len, text.splitlines())) <= 88 or name == "requirements.txt"
    assert "class TwoRings(mpl.Experiment)" in (folder / "two_rings.py").read_text()
    assert (folder / "requirements.txt").read_text() == (
        f"mpl @ {ROOT.as_uri()}\npytest\n")


def test_an_installed_mpl_is_named_by_its_version(tmp_path, monkeypatch):
    monkeypatch.setattr(mpl, "__file__", str(tmp_path / "mpl" / "__init__.py"))
    folder = new.write(tmp_path / "rings")
    assert (folder / "requirements.txt").read_text() == (
        f"mpl=={mpl.__version__}\npytest\n")


@pytest.mark.slow
def test_the_project_trains_and_its_test_passes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert new.main(["rings"]) == 0
    typed = shlex.split(capsys.readouterr().out.partition("&&")[2])
    assert typed == [sys.executable, "rings.py", "--mode=all"]
    trained, tested = (
        subprocess.run(words, cwd="rings", env=ENVIRON, timeout=120, text=True,
                       capture_output=True)
        for words in (typed, [sys.executable, "-m", "pytest", "-q"]))
    assert trained.returncode == 0, trained.stderr
    *lines, last = trained.stdout.splitlines()
    assert last.startswith("rings: accuracy 0.9") and float(last.split()[2]) > 0.95
    assert any(line.startswith("Predictions for 1000 examples") for line in lines)
    assert "2 passed" in tested.stdout, tested.stdout


@pytest.mark.parametrize("name", ["Rings", "two-rings", "2rings", "class", "", "a b"])
def test_a_name_that_is_no_modules(name, tmp_path, capsys):
    assert new.main([f"{tmp_path}/a/{name}" if name else ""]) == 1
    cause, remedy = capsys.readouterr().err.splitlines()
    assert cause.startswith(f"`name` ({name}) must be small letters, digits and _")
    assert remedy == "Write for example my_experiment."
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["json", "keras", "mpl"])
def test_the_name_of_another_module(name, tmp_path):
    with pytest.raises(ConfigError) as caught:
        new.write(tmp_path / name)
    assert caught.value.cause.startswith(f"`name` ({name}) must not be that of a mod")
    assert caught.value.remedy == f"Write for example my_{name}."
    assert os.listdir(tmp_path) == []


def test_what_is_there_already(tmp_path):
    (tmp_path / "rings").mkdir()
    with pytest.raises(ConfigError) as caught:
        new.write(tmp_path / "rings")
    assert str(caught.value) == (
        f"`name` ({tmp_path / 'rings'}) must be a folder that is not there yet.\n"
        "Give another name, or delete what is there.")
    assert os.listdir(tmp_path / "rings") == []


def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(ConfigError, match="No such file or directory"):
        new.write(tmp_path / "none" / "rings")
    assert os.listdir(tmp_path) == []


def test_nothing_is_written_by_half(tmp_path, monkeypatch):
    def fails(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_text", fails)
    with pytest.raises(ConfigError, match="No space left on device"):
        new.write(tmp_path / "rings")
    assert os.listdir(tmp_path) == []


def test_a_wrong_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        new.main(["rings", "--force"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        "unrecognized arguments: --force.\nSee python -m mpl.tools.new --help.\n")
