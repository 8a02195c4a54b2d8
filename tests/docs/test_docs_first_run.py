"""What docs/first_run.md shows is printed and written; its commands run."""

import os
import re

import numpy as np
import pages
import pytest

from experiments.digits import Digits

PAGE = "first_run.md"


def pattern(line):
    """Returns what matches a line with other numbers, on another machine."""
    if word := re.match(r"CPU |Versions |Strategy ", line):
        return f"{word[0]}.*"
    if note := re.match(r"I\d+ .*\] (\w+ auto: )", line):
        return rf"I\d+ .*\] {note[1]}.*"
    parts = re.split(r"mixed_bfloat16|[\d.,:e+-]*\d[\d.,:e+-]*", line)
    return r"[\w.,:+-]+".join(map(re.escape, parts))


@pytest.mark.slow
def test_what_is_printed(first_run):
    _, ended = first_run
    lines = (ended.stderr + ended.stdout).replace(
        pages.sys.executable, ".venv/bin/python").splitlines()
    shown = pages.blocks(PAGE)[0].splitlines()
    assert len(shown) > 10
    for line in shown:
        if line != "...":
            assert any(re.fullmatch(pattern(line), each) for each in lines), line


@pytest.mark.slow
def test_what_lies_in_the_folder(first_run):
    folder = first_run[0] / "runs" / "digits"
    assert os.path.islink(folder / "latest") and len(os.listdir(folder)) == 2
    names = pages.row_names(pages.text_of(PAGE), "| file | what |")
    assert {name.rstrip("/") for name in names} | {"goodput.json", "lock"} == set(
        os.listdir(folder / "latest"))
    with np.load(folder / "latest" / "predictions.npz") as arrays:
        assert arrays["predictions"].shape == (360, 10)


def test_make_train_is_the_command_that_follows():
    makefile = (pages.ROOT / "Makefile").read_text(encoding="utf-8")
    make, command = pages.commands(PAGE)[:2]
    assert make == "make train"
    assert "train: .venv/installed-train " in makefile
    assert f"\t@{command}\n" in makefile.replace("$(PY)", ".venv/bin/python")


@pytest.mark.slow
def test_the_other_commands(first_run, tmp_path, monkeypatch, capsys):
    folder, _ = first_run
    os.symlink(folder / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    resume, evaluate, predict, show, float32, short = pages.commands(PAGE)[2:]
    latest = (folder / "runs" / "digits" / "latest").resolve()
    pages.typed(resume.replace("=60", "=3"), Digits)
    out = capsys.readouterr().out
    assert "Going on at step 40 of 60 in " in out
    assert "Changed since the run began: train_epochs 2 -> 3" in out
    assert "accuracy" in pages.typed(evaluate, Digits)["test"]
    assert "Restored step 60 of " in capsys.readouterr().out
    pages.typed(predict, Digits)
    with np.load("digits.npz") as arrays:
        assert arrays["predictions"].shape == (360, 10)
    with pytest.raises(SystemExit) as caught:
        pages.typed(show, Digits)
    assert caught.value.code == 0 and "--hidden=64" in capsys.readouterr().out
    pages.typed(float32, Digits, "--train_epochs=1")
    with open("runs/float32/flagfile.txt") as file:
        assert "--policy=float32\n" in file.read()
    pages.typed(short.replace("=300", "=3"), Digits)
    assert (folder / "runs" / "digits" / "latest").resolve() != latest
    assert "step 3/3 " in capsys.readouterr().out


def test_a_wrong_flag(capsys):
    cause, remedy = pages.blocks(PAGE)[1].splitlines()
    value = re.findall(r"\((\w+)\)", cause)[0]
    with pytest.raises(SystemExit) as caught:
        pages.typed(f"python --policy={value}", Digits)
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"{cause}\n{remedy}\n"
