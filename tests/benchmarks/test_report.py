"""results.json is whole and valid, tables fit, and losses that differ are loud."""

import json
import math
import os

import pytest

from experiments.benchmarks import goals, report
from experiments.benchmarks.measure import Ratio, Record, Run

FACTS = {"batch_size": 32, "variables": 4, "parameters": 1_000, "bytes_per_step": 128,
         "flops_per_step": None, "first_step_s": 9.0}
MPL = Run("cnn", "float32", "none", "mpl")
RAW, FIT = MPL._replace(system="raw"), MPL._replace(system="keras_fit")


def record(ms=1.0, loss=2.0, **values):
    return Record(
        facts=FACTS, first_steps_s=[3.0, 5.0, 4.0], rss_mb=[700.0, 702.0, 701.0],
        loss=loss, ms={"steps": [ms, 3 * ms, 2 * ms]}, counts={"steps": 64},
        side_by_side="cnn", **values)


def test_a_row_has_the_keys_that_programs_read():
    rows = report.rows({MPL: record(1.0), RAW: record(2.0)})
    assert [row["system"] for row in rows] == ["mpl", "raw"]
    expected = {
        "work": "cnn", "policy": "float32", "scaling": "none", "system": "raw",
        "ms_per_step": {"min": 2.0, "median": 4.0, "max": 6.0}, "first_step_s": 4.0,
        "peak_memory_mb": 701.0, "loss_after": 2.0, "examples_per_sec": 8000.0,
        "bytes_per_step": 128, "blocks_ms": [2.0, 6.0, 4.0], "error": None}
    assert expected.items() <= rows[1].items()
    assert rows[1]["ratios"]["mpl_over_this_step"] == {
        "ratio": 0.5, "low": 0.5, "high": 0.5}
    assert rows[1]["ratios"]["mpl_over_this_start"]["ratio"] == 1.0


def test_a_run_that_failed_has_a_row_without_figures():
    (row,) = report.rows({RAW: Record(error="ended with code 1")})
    assert row["ms_per_step"] == {"min": None, "median": None, "max": None}
    assert row["first_step_s"] is row["peak_memory_mb"] is row["loss_after"] is None
    assert row["error"] == "ended with code 1"


def test_rows_say_what_scaling_costs_and_what_16_bits_bring():
    dynamic = MPL._replace(scaling="dynamic")
    bf16 = MPL._replace(policy="mixed_bfloat16")
    rows = report.rows({MPL: record(2.0), dynamic: record(3.0), bf16: record(1.0)})
    assert rows[1]["ratios"]["dynamic_over_none_step"]["ratio"] == 1.5
    assert rows[2]["ratios"]["float32_over_this_step"]["ratio"] == 2.0


def test_results_are_valid_json_with_null_for_what_is_not_finite(tmp_path):
    path = tmp_path / "results.json"
    records = {MPL: record(loss=math.nan), RAW: record(),
               Run("import", "", "none", "mpl"): Record(first_steps_s=[2.0])}
    results = goals.judge(records, ["cnn"], ["float32"])
    report.write_json(path, report.results_json(
        {"load_average": (0.5, math.inf)}, records, results, command="x", date="y"))

    def refuse(constant):
        raise AssertionError(constant)

    content = json.loads(path.read_text(), parse_constant=refuse)
    assert content["machine"] == {"load_average": [0.5, None]}
    assert [row["loss_after"] for row in content["rows"]] == [None, 2.0]
    assert content["import_secs"] == {"mpl": [2.0]}
    assert content["command"] == "x" and content["date"] == "y"
    assert content["goals"][0]["verdict"] == "not measured"
    assert content["goals"][0]["ratio"] is None
    assert len(content["loss_mismatches"]) == 1


def test_a_write_that_fails_leaves_the_former_results(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    report.write_json(path, {"rows": [1]})
    with pytest.raises(TypeError):
        report.write_json(path, {"rows": object()})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        report.write_json(path, {"rows": [2]})
    assert json.loads(path.read_text()) == {"rows": [1]}


@pytest.mark.parametrize("policy, loss, differs", [
    ("float32", 2.0059, False), ("float32", 2.0061, True), ("float32", math.nan, True),
    ("mixed_bfloat16", 2.09, False), ("mixed_bfloat16", 2.11, True)])
def test_losses_are_compared_with_the_hand_written_loop(policy, loss, differs):
    raw, ours = RAW._replace(policy=policy), MPL._replace(policy=policy)
    lines = report.loss_mismatches({ours: record(loss=loss), raw: record(loss=2.0)})
    assert len(lines) == differs
    if differs:
        assert f"cnn {policy} none mpl {loss:.6g}, raw 2;" in lines[0]


@pytest.mark.parametrize("policy, first, differs", [
    ("float32", 2.502, False), ("float32", 2.503, True),
    ("mixed_bfloat16", 2.54, False), ("mixed_bfloat16", 2.56, True)])
def test_the_first_steps_losses_are_compared_more_closely(policy, first, differs):
    raw, ours = RAW._replace(policy=policy), MPL._replace(policy=policy)
    lines = report.loss_mismatches({
        raw: record(first_loss=2.5), ours: record(first_loss=first)})
    assert len(lines) == differs
    assert not differs or "DIFFER after 1 steps: cnn" in lines[0]


def test_losses_of_other_policies_and_scalings_are_not_compared():
    others = [MPL._replace(policy="mixed_bfloat16"), MPL._replace(scaling="dynamic")]
    records = {RAW: record(loss=2.0), **{run: record(loss=3.0) for run in others}}
    assert report.loss_mismatches(records) == []


def test_a_run_that_failed_is_a_fault():
    records = {MPL: record(), RAW: Record(error="no answer (steps) within 900 s")}
    assert report.faults(records) == [
        "FAILED: cnn float32 none raw: no answer (steps) within 900 s"]


def test_tables_fit_100_columns_and_say_the_ratio():
    slow = Run("recommender", "mixed_bfloat16", "dynamic", "keras_fit")
    records = {MPL: record(1.0), RAW: record(2.0), FIT: Record(error="x" * 200),
               slow: record(12_345.678)}
    results = goals.judge(records, ["cnn", "recommender"], goals.POLICIES)
    text = report.tables(records) + report.goals_table(results)
    assert [line for line in text.splitlines() if len(line) > 100] == []
    raw = next(line for line in text.splitlines() if line.startswith("  raw"))
    assert raw.split() == ["raw", "none", "4", "(2–6)", "0.50", "(0.50–0.50)", "4",
                           "701", "2.0000"]
    assert "12,346–37,037" in text


def test_goals_that_were_missed_come_first():
    goal = goals.Goal("step", MPL, RAW, 0.9)
    results = [goals.Result(goal, ratio, goal.verdict(ratio))
               for ratio in (None, Ratio(0.8, 0.7, 0.85), Ratio(1.2, 1.1, 1.3))]
    lines = report.goals_table(results).splitlines()[2:]
    assert [line.split()[0] for line in lines] == ["missed", "met", "not"]
    assert lines[0].split()[1:5] == ["1.20", "(1.10–1.30)", "≤", "0.9"]


def test_the_picture_is_drawn_or_the_lack_of_matplotlib_is_said(tmp_path, monkeypatch):
    said = []
    with monkeypatch.context() as context:
        context.setitem(__import__("sys").modules, "matplotlib.figure", None)
        assert not report.draw({MPL: record()}, tmp_path / "a.png", said.append)
    assert said == [
        "No picture: pip install matplotlib (the extra `plots`) to have one."]

    records = {MPL: record(1.0), RAW: record(2.0), FIT: record(0.5)}
    assert report.draw(records, tmp_path / "b.png", said.append)
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    assert report.draw({}, tmp_path / "c.png", said.append)
    assert len(said) == 1


def test_who_trained_nothing_is_found_however_little_there_was_to_learn():
    still, moved = (Record(first_loss=2.302, loss=loss) for loss in (2.302, 2.300))
    for policy, shares in (("float32", (0.0, 0.95)), ("mixed_bfloat16", (0.0, 0.6))):
        raw, mpl = (Run("deep", policy, "none", system) for system in ("raw", "mpl"))
        assert report.loss_mismatches({raw: moved, mpl: still})
        close = Record(first_loss=2.302, loss=2.302 - 0.002 * shares[1])
        assert not report.loss_mismatches({raw: moved, mpl: close})
