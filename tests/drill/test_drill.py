"""The drill finds what is lost, and nothing where nothing is."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from tests.drill import __main__ as drill_main
from tests.drill import compare, damages, kills
from tests.drill.drill import Row
from tests.drill.run import ROOT, Run


def test_arrays_are_compared_bit_for_bit():
    wanted = {"a": np.float32([0.0, np.nan]), "b": np.int64([3])}
    assert compare.differing({**wanted}, wanted) == []
    assert compare.differing({**wanted, "a": np.float32([-0.0, np.nan])}, wanted) == [
        "a"]
    assert compare.differing({"a": wanted["a"], "b": np.int32([3])}, wanted) == ["b"]
    assert compare.differing({"a": wanted["a"], "c": wanted["b"]}, wanted) == ["b", "c"]


def test_lines_that_are_torn_or_there_twice_are_found(tmp_path):
    path = tmp_path / "metrics.jsonl"
    line = {"step": 10, "split": "train", "loss": 0.5, "time": 3.0, "goodput": 0.5}
    note = {"step": 10, "split": "note", "note": "Preempted"}
    path.write_text("".join(f"{json.dumps(each)}\n" for each in (line, note)))
    assert compare.lines(path) == (
        {(10, "train"): {"step": 10, "split": "train", "loss": 0.5}}, [])
    with path.open("a") as file:
        file.write(f'{json.dumps(line)}\n{{"step": 2')
    assert compare.lines(path)[1] == [
        "metrics.jsonl: step 10 of train is there twice",
        "metrics.jsonl: line 4 cannot be read"]


def test_what_a_save_left_is_seen(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    (folder / "best" / "loss").mkdir(parents=True)
    for name in ("ckpt-10.index", "ckpt-10.commit", "checkpoint", "ckpt-20.index",
                 "checkpoint.tmp", "best/loss/ckpt-9.data-00000-of-00001"):
        (folder / name).write_text("x")
    (folder / "ckpt-30_temp").mkdir()
    run = Run(tmp_path / "run")
    assert run.committed() == [10]
    assert {name for name, _ in run.unfinished()} == {
        "ckpt-20.index", "checkpoint.tmp", "ckpt-9.data-00000-of-00001",
        "ckpt-30_temp"}


def test_damages_damage(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(10)))
    damages.flip(path)
    assert path.read_bytes() == bytes([0, 1, 2, 3, 4, 4, 6, 7, 8, 9])
    damages.cut(path)
    assert path.read_bytes() == bytes(range(5))


def hits(count, phase="training", left=()):
    return [{"phase": phase, "left": list(left)}] * count


@pytest.mark.parametrize("made, passes", [
    (hits(30) + hits(10, "start-up") + hits(5, "evaluation of validation")
     + hits(5, left=["ckpt-10.index"]), True),
    (hits(35) + hits(10, "start-up") + hits(5, "evaluation of validation"), False),
    (hits(45) + hits(5, left=["ckpt-10.index"]), False),
    (hits(10) + hits(10, left=["ckpt-10.index"]), False)])
def test_kills_that_miss_what_they_are_for_do_not_pass(made, passes):
    row = kills.summary([Row("kills", "", True, "", {"kills": made})], 50)
    assert row.passed is passes
    failed = kills.summary([Row("kills", "", False, "", {"kills": made})], 50)
    assert failed.passed is False


@pytest.mark.parametrize("row, code, shown", [
    (Row("seek", "one", True), 0, "passed"), (Row("seek", "one", None), 0, "skipped"),
    (Row("seek", "one", False), 1, "FAILED"), (None, 1, "FAILED")])
def test_exit_code_and_table(row, code, shown, monkeypatch, tmp_path):
    monkeypatch.setattr(drill_main, "jobs_of", lambda *_: [
        lambda: [row] if row else 1 / 0])
    assert drill_main.main([f"--out={tmp_path}", "--only=seek"]) == code
    report = json.loads((tmp_path / "drill.json").read_text())
    assert [each["passed"] for each in report["rows"]] == [row and row.passed or (
        None if row and row.passed is None else False)]
    assert f"| {shown} |" in (tmp_path / "drill.md").read_text()


@pytest.mark.slow
def test_kills_pass_and_a_run_that_forgets_its_place_does_not(tmp_path):
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-m", "tests.drill", f"--out={tmp_path / name}",
             "--only=kills", *flags], cwd=ROOT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT)
        for name, flags in {
            "good": ["--kills=3", "--steps=500", "--seed=2"],
            "bad": ["--kills=1", "--steps=500", "--seed=2",
                    f"--program={ROOT / 'tests' / 'drill' / 'forgetful.py'}"],
        }.items()}
    try:
        said = {name: process.communicate(timeout=300)[0]
                for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    assert processes["good"].returncode == 0, said["good"]
    rows = json.loads((tmp_path / "good" / "drill.json").read_text())["rows"]
    assert [row["passed"] for row in rows] == [True, True]
    made = rows[0]["details"]["kills"]
    assert [hit["aim"] for hit in made] == ["an evaluation", "a save", "any moment"]
    assert made[0]["last_checkpoint"]
    assert processes["bad"].returncode == 1, said["bad"]
    assert re.search(r"ckpt-500: model\S+ differs", said["bad"]), said["bad"]
    assert not subprocess.run(
        ["pgrep", "-f", str(tmp_path)], stdout=subprocess.PIPE).stdout
