"""A goal is met by its median, and missed only if the interval excludes its bound."""

import math

import pytest

from experiments.benchmarks import goals
from experiments.benchmarks.goals import Goal
from experiments.benchmarks.measure import Ratio, Record, Run

MPL = Run("cnn", "mixed_bfloat16", "none", "mpl")
RAW = MPL._replace(system="raw")
AT_MOST = Goal("step", MPL, RAW, 0.9)
AT_LEAST = Goal("step", MPL._replace(policy="float32"), MPL, 1.6, at_least=True)


@pytest.mark.parametrize("goal, ratio, verdict", [
    (AT_MOST, Ratio(0.9, 0.8, 1.2), "met"),
    (AT_MOST, Ratio(0.95, 0.9, 1.0), "open"),
    (AT_MOST, Ratio(0.95, 0.91, 1.0), "missed"),
    (AT_MOST, Ratio(0.95, math.nan, math.nan), "open"),
    (AT_MOST, Ratio(math.nan, math.nan, math.nan), "not measured"),
    (AT_MOST, None, "not measured"),
    (AT_LEAST, Ratio(1.6, 1.1, 1.7), "met"),
    (AT_LEAST, Ratio(1.5, 1.4, 1.6), "open"),
    (AT_LEAST, Ratio(1.5, 1.4, 1.59), "missed"),
])
def test_verdicts(goal, ratio, verdict):
    assert goal.verdict(ratio) == verdict


def test_names_say_what_is_compared():
    assert AT_MOST.name == "cnn mixed_bfloat16, step: mpl ÷ raw"
    assert AT_LEAST.name == "cnn mpl, step: float32 ÷ mixed_bfloat16"
    dynamic = MPL._replace(scaling="dynamic")
    assert Goal("step", dynamic, MPL, 1).name == (
        "cnn mixed_bfloat16 mpl, step: dynamic ÷ none")
    assert Goal("first_step", dynamic, RAW._replace(scaling="dynamic"), 1).name == (
        "cnn mixed_bfloat16 dynamic scaling, first step without imports: mpl ÷ raw")
    assert Goal("matmul_fraction", MPL, None, 0.5).name == (
        "cnn mixed_bfloat16 mpl: matmul fraction")


def test_a_ratio_is_paired_only_if_blocks_were_taken_in_turn():
    times = [1.0, 8.0, 2.0, 5.0, 3.0]
    records = {MPL: Record(ms={"steps": times}, side_by_side="a"),
               RAW: Record(ms={"steps": times}, side_by_side="a")}
    assert AT_MOST.ratio(records) == (1.0, 1.0, 1.0)
    records[RAW].side_by_side = "b"
    assert AT_MOST.ratio(records).low < 1.0 < AT_MOST.ratio(records).high


@pytest.mark.parametrize("figure, expected", [
    ("step", 0.5), ("update", 0.25), ("first_step", 2.0), ("memory", 0.9)])
def test_each_figure_has_its_own_samples(figure, expected):
    records = {
        MPL: Record(ms={"steps": [1.0], "update": [1.0]}, builds_s=[6.0],
                    rss_mb=[90.0]),
        RAW: Record(ms={"steps": [2.0], "update": [4.0]}, builds_s=[3.0],
                    rss_mb=[100.0])}
    assert Goal(figure, MPL, RAW, 1.0).ratio(records).ratio == pytest.approx(expected)


def test_memory_is_the_allocators_where_it_tells_and_may_hold_a_bucket_more():
    records = {MPL: Record(rss_mb=[900.0] * 3, allocator_mb=[134.0] * 3),
               RAW: Record(rss_mb=[100.0] * 3, allocator_mb=[100.0] * 3)}
    goal = Goal("memory", MPL, RAW, 1.02, less_mb=goals.BUCKET_MB)
    assert goal.ratio(records).ratio == pytest.approx(1.02)
    assert goal.verdict(goal.ratio(records)) == "met"


def test_the_growth_of_the_update_compares_two_works():
    ours = Run("vars1000", "float32", "none", "mpl")
    records = {ours: Record(ms={"update": [3.0] * 3}, side_by_side="vars1000"),
               ours._replace(work="vars10"):
                   Record(ms={"update": [1.0] * 3}, side_by_side="vars10")}
    results = {result.goal.name: result
               for result in goals.judge(records, ["vars10", "vars1000"], ["float32"])}
    result = results["float32 mpl, update: vars1000 ÷ vars10"]
    assert result.ratio.ratio == 3.0 and result.verdict == "missed"


def test_the_import_is_compared_with_that_of_tensorflow():
    records = {Run("import", "", "none", "mpl"): Record(first_steps_s=[2.0] * 5),
               Run("import", "", "none", "tensorflow"):
                   Record(first_steps_s=[2.0] * 5)}
    (result,) = goals.judge(records, ["import"], ["float32"])
    assert result.goal.name == "import, start: mpl ÷ tensorflow"
    assert result.verdict == "met"


def test_goals_are_those_of_the_works_and_policies_asked_for():
    results = goals.judge({}, ["cnn", "digits"], ["float32", "mixed_bfloat16"])
    assert {result.verdict for result in results} == {"not measured"}
    bounds = {result.goal.name: result.goal.bound for result in results}
    assert bounds == {
        "cnn mixed_bfloat16, step: mpl ÷ raw": 1.0,
        "cnn mixed_bfloat16, step: mpl ÷ keras_fit": 0.75,
        "cnn mpl, step: float32 ÷ mixed_bfloat16": 1.6,
        "cnn float32 mpl, step: dynamic ÷ none": 1.03,
        "cnn mixed_bfloat16 mpl, step: dynamic ÷ none": 1.03,
        "cnn mixed_bfloat16, memory − 32 MB: mpl ÷ keras_fit": 1.02,
        "digits float32, start: mpl ÷ keras_fit": 1.0,
        "digits mixed_bfloat16, start: mpl ÷ keras_fit": 1.0,
    }


def test_the_tiny_work_may_lose_more_to_dynamic_scaling():
    results = goals.judge({}, ["tiny"], ["float32"])
    bounds = {result.goal.name: result.goal.bound for result in results}
    assert bounds["tiny float32 mpl, step: dynamic ÷ none"] == 1.15
    assert bounds["tiny float32 dynamic scaling, step: mpl ÷ raw"] == 1.0


def test_every_goal_is_about_a_work_that_exists():
    from experiments.benchmarks import works

    named = {run.work for goal in goals.ALL for run in (goal.over, goal.under) if run}
    assert named <= {*works.WORKS, goals.IMPORT}
    assert goals.DIGITS in works.WORKS
