"""The parity table: its figures by hand, its failures, and one of digits."""

import json
import pathlib
import subprocess
import sys

import pytest

from experiments.benchmarks import parity
from mpl.errors import ConfigError
from mpl.tools.comparison import spread

ROOT = pathlib.Path(__file__).parents[2]


def compared(**finals):
    """Returns the content of a compare.json of two seeds."""
    base = finals["float32"]
    return {
        "metric": "accuracy", "final_split": "test", "seeds": [0, 1],
        "policies": {
            policy: {
                "final": spread(values),
                "difference": spread(a - b for a, b in zip(values, base)),
                "training_secs": spread([2.0, 4.0]),
                "process_secs": spread([10.0, 10.0]),
                "peak_memory_mb": spread([500.0, 600.0]),
            } for policy, values in finals.items()}}


FITS = [{"secs": 15.0, "peak_memory_mb": 700.0, "final": 0.5, "training_secs": 5.0},
        {"secs": 12.0, "peak_memory_mb": 700.0, "final": 0.75, "training_secs": 6.0}]


def test_figures_by_hand():
    found = compared(float32=[0.5, 0.75], mixed_bfloat16=[0.25, 0.25],
                     mixed_float16=[0.5, 0.5])
    got = parity.figures(found, {policy: FITS for policy in found["policies"]})
    assert (got["metric"], got["reference"]) == ("test accuracy", "float32")
    assert got["seeds"] == [0, 1]
    # float32: 0.625 ± 0.177
    assert [row["within"] for row in got["policies"].values()] == [None, False, True]
    row = got["policies"]["mixed_float16"]
    assert row["difference"]["values"] == [0.0, -0.25]
    assert row["fit_over_mpl_training"]["values"] == [2.5, 1.5]
    assert row["fit_over_mpl_process"]["values"] == [1.5, 1.2]
    assert row["fit_final"]["mean"] == 0.625
    assert parity.rows("toy", got)[1:] == [
        ["toy", "mixed_bfloat16", "test accuracy", "0.25 ± 0", "-0.375 ± 0.18", "NO",
         "3 ± 1.4", "10 ± 0", "550 ± 71", "0.625 ± 0.18", "2 ± 0.71", "1.35 ± 0.21"],
        ["toy", "mixed_float16", "test accuracy", "0.5 ± 0", "-0.125 ± 0.18", "yes",
         "3 ± 1.4", "10 ± 0", "550 ± 71", "0.625 ± 0.18", "2 ± 0.71", "1.35 ± 0.21"]]


def test_without_fit_and_with_one_seed():
    found = compared(float32=[0.5], mixed_float16=[0.25])
    got = parity.figures(found, {})
    assert got["policies"]["mixed_float16"]["within"] is None
    row = parity.rows("toy", got)[1]
    assert row[3:6] == ["0.25", "-0.25", "–"] and row[-3:] == ["–"] * 3


def test_mpl_and_fit_take_turns_policy_by_policy(tmp_path, monkeypatch):
    done = []

    def by_mpl(command, policies, seeds, out):
        done.extend(("mpl", policy, seed) for seed in seeds for policy in policies
                    if ("mpl", policy, seed) not in done)
        assert command[2:] == ["experiments.toy", "--mode=train_and_eval", "--hidden=8"]
        content = compared(float32=[0.5, 0.75], native=[0.5, 0.5])
        parity.report.write_json(pathlib.Path(out) / "compare.json", content)

    def by_fit(name, extra, policy, seed, out):
        done.append(("fit", policy, seed))
        assert (name, extra, out) == ("toy", ["--hidden=8"], tmp_path / "fit")
        return {"why_not": "a loop"} if policy == "native" else FITS[seed]

    monkeypatch.setattr(parity.compare, "run", by_mpl)
    monkeypatch.setattr(parity, "_fit_once", by_fit)
    (tmp_path / "mpl").mkdir()
    got = parity.measure(
        "toy", ["--hidden=8"], ["float32", "native"], [0, 1], tmp_path)
    assert done == [
        ("mpl", "float32", 0), ("fit", "float32", 0), ("mpl", "native", 0),
        ("fit", "native", 0), ("mpl", "float32", 1), ("fit", "float32", 1),
        ("mpl", "native", 1)]
    assert got["no_fit"] == {"native": "a loop"} and got["seeds"] == [0, 1]
    assert got["policies"]["float32"]["fit_final"]["values"] == [0.5, 0.75]
    assert list(got["policies"]) == ["float32", "native"]


@pytest.mark.parametrize("given", [[], ["--depth=14"]])
def test_what_takes_too_long_is_cut_short_and_named(given, tmp_path, monkeypatch):
    asked = {}

    def measure(name, extra, policies, seeds, out):
        asked[name] = list(extra)
        return {"command": "x", "no_fit": {}, **parity.figures(
            compared(float32=[0.5, 0.75]), {})}

    monkeypatch.setattr(parity, "measure", measure)
    names = ["cifar_resnet", "digits"]
    assert parity.run(names, given, ["float32"], [0, 1], tmp_path)
    cut = ["--depth=8", "--global_batch_size=32", "--train_epochs=4"]
    assert asked == {"cifar_resnet": given or cut, "digits": given}
    note = f"- cifar_resnet is cut short by {' '.join(cut)}: as it is, it takes "
    assert (note in table(tmp_path)) == (not given)
    assert "- digits is cut short" not in table(tmp_path)
    assert "- Left out: imagenet_resnet, one of whose steps takes " in table(tmp_path)
    content = json.loads((tmp_path / "parity.json").read_text())["binaries"]
    noted = content["cifar_resnet"].get("cut_short")
    assert noted == (None if given else " ".join(cut))


def test_binaries_that_are_cut_short_or_left_out_are_there():
    assert {*parity.CUT_SHORT, *parity.LEFT_OUT} <= set(parity.binaries.names())


def table(out):
    return (out / "parity.md").read_text(encoding="utf-8")


def test_what_fails_is_told_and_the_rest_measured(tmp_path, monkeypatch, capsys):
    def measure(name, extra, policies, seeds, out):
        if name == "gan_digits":
            raise ConfigError("It ended with exit code 1.", "See its log.")
        assert (extra, policies, seeds) == (["--hidden=8"], ["float32"], [3])
        assert out == tmp_path / "out" / name
        fits = {"float32": FITS}
        return {"command": "x", "no_fit": {}, **parity.figures(
            compared(float32=[0.5, 0.75]), fits)}

    monkeypatch.setattr(parity, "measure", measure)
    arguments = [f"--out={tmp_path / 'out'}", "--binaries=gan_digits,digits",
                 "--policies=float32", "--seeds=3", "--", "--hidden=8"]
    assert parity.main(arguments) == 1
    text = table(tmp_path / "out")
    assert text in capsys.readouterr().out
    assert "- gan_digits failed: It ended with exit code 1. See its log.\n" in text
    assert "| digits | float32 | test accuracy | 0.625 ± 0.18 | 0 ± 0 | – |" in text
    assert "should be at least 1.25; below: none.\n" in text
    assert "judge the loops by training" in text
    content = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert list(content["binaries"]) == ["gan_digits", "digits"]
    assert content["machine"]["cores"] >= 1 and content["date"].startswith("20")


def test_what_is_slower_than_the_goal_is_named():
    slow = [{**each, "secs": 11.0} for each in FITS]
    measured = parity.figures(compared(float32=[0.5, 0.75]), {"float32": slow})
    content = {"command": "x", "binaries": {"toy": {**measured, "no_fit": {}}}}
    assert "below: toy float32 (1.10).\n" in parity.markdown(content)
    content["binaries"]["toy"]["no_fit"] = {
        "float32": "a loop", "bfloat16": "a module", "float16": "a module"}
    text = parity.markdown(content)
    assert "- toy has no `fit` beside it in float32: a loop.\n" in text
    assert "- toy has no `fit` beside it in bfloat16, float16: a module.\n" in text


def test_wrong_names(tmp_path, capsys):
    assert parity.main([f"--out={tmp_path}", "--binaries=digits,nothing"]) == 1
    assert capsys.readouterr().err.startswith(
        "`binaries` (nothing) are not there.\nUse some of ")
    assert parity.main([f"--out={tmp_path}", "--policies=float99"]) == 1
    assert capsys.readouterr().err.startswith("`policy` (float99) is not known.\n")
    with pytest.raises(SystemExit) as end:
        parity.main([])
    assert end.value.code == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.slow
def test_the_table_of_digits(tmp_path):
    command = [
        sys.executable, "-m", "experiments.benchmarks.parity", f"--out={tmp_path}",
        "--binaries=digits", "--policies=float32,mixed_float16", "--seeds=0", "--",
        "--train_steps=4", "--hidden=8", "--summary_every_steps=0"]
    for again in (False, True):  # what is done is read, not made again
        done = subprocess.run(command, cwd=ROOT, timeout=300, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 0, done.stdout
        assert done.stdout.count(": starts, see ") == (0 if again else 4)
    row = json.loads((tmp_path / "parity.json").read_text())["binaries"]["digits"]
    assert row["no_fit"] == {} and row["metric"] == "test accuracy"
    for policy in ("float32", "mixed_float16"):
        figures = row["policies"][policy]
        for name in ("final", "fit_final", "training_secs", "process_secs",
                     "peak_memory_mb", "fit_over_mpl_training",
                     "fit_over_mpl_process"):
            assert figures[name]["values"][0] > 0, (policy, name)
    assert "| digits | mixed_float16 | test accuracy |" in table(tmp_path)
    start = f"    python -m experiments.benchmarks.parity --out={tmp_path} --binaries="
    assert start in table(tmp_path)
    left = subprocess.run(
        ["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, timeout=10)
    assert left.stdout == ""
