import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import matplotlib.image
import numpy as np
import pytest
import tensorflow as tf

from mpl.errors import ConfigError
from mpl.record.export import export_saved_model
from mpl.tools import compare, comparison, trials
from mpl.tools.comparison import agreement, spread
from mpl.tools.runs import Run

FAKE = [sys.executable, str(pathlib.Path(__file__).with_name("fake_experiment.py"))]
POLICIES = ["float32", "mixed_bfloat16", "mixed_float16"]


def main(out, *flags, policies=",".join(POLICIES), seeds="0,1", command=FAKE):
    ours = [f"--policies={policies}", f"--seeds={seeds}", f"--out={out}"]
    own = [flag for flag in flags if flag.startswith("--target")]
    return compare.main(
        [*ours, *own, "--", *command, *(flag for flag in flags if flag not in own)])


def results(out):
    return json.loads((out / "compare.json").read_text())


def starts(out, policy, seed=0):
    return (out / policy / str(seed) / "starts").read_text().split("\n")[:-1]


def write_predictions(out, policy, seed, **arrays):
    np.savez(out / policy / str(seed) / "predictions.npz", **arrays)


def test_figures_of_each_policy(tmp_path, capsys):
    assert main(tmp_path) == 0
    for seed in (0, 1):  # a second call reads what is there
        classes = np.eye(4)[[0, 1, 2, 3]]
        write_predictions(tmp_path, "float32", seed, predictions=classes)
        write_predictions(tmp_path, "mixed_bfloat16", seed, predictions=classes / 2)
        other = np.eye(4)[[0, 1, 2, 2 + seed]]
        write_predictions(tmp_path, "mixed_float16", seed, predictions=other)
    capsys.readouterr()
    assert main(tmp_path) == 0
    out = capsys.readouterr().out
    found = results(tmp_path)
    assert found["command"] == FAKE and found["seeds"] == [0, 1]
    assert (found["metric"], found["split"], found["final_split"]) == (
        "accuracy", "validation", "test")
    assert (found["reference"], found["equal_secs"], found["target"]) == (
        "float32", 5.0, 0.78125)
    assert list(found["policies"]) == POLICIES
    by_name = {name: [found["policies"][policy][name]["values"] for policy in POLICIES]
               for name in found["policies"]["float32"]}
    for name in ("process_secs", "peak_memory_mb"):
        measured = by_name.pop(name)
        assert all(0 < value < 1000 for values in measured for value in values)
    assert by_name == {
        "training_secs": [[10, 10], [5, 5], [8, 8]],
        "speedup": [[1, 1], [2, 2], [1.25, 1.25]],
        "steps_per_sec": [[10, 10], [20, 20], [12.5, 12.5]],
        "final": [[0.75, 0.875], [0.75, 0.875], [0.5, 0.625]],
        "difference": [[0, 0], [0, 0], [-0.25, -0.25]],
        "skipped_steps": [[0, 0], [0, 0], [2, 2]],
        "at_equal_time": [
            [0.390625, 0.40625], [0.78125, 0.796875], [0.390625, 0.40625]],
        "secs_to_target": [[10, 10], [5, 5], [8, 8]],
        "same_class_percent": [[100, 100], [100, 100], [75, 100]],
        **{name: [[None, None]] * 3 for name in (
            "largest_difference", "predict_1_ms", "predict_256_ms")},
    }
    final = found["policies"]["float32"]["final"]
    assert final["mean"] == 0.8125 and final["std"] == pytest.approx(0.125 / 2**0.5)
    markdown = (tmp_path / "compare.md").read_text()
    assert markdown in out
    for line in (
        "|  | float32 | mixed_bfloat16 | mixed_float16 |",
        "| time in training [s] | 10 ± 0 | 5 ± 0 | 8 ± 0 |",
        "| speed-up over float32 | 1 ± 0 | 2 ± 0 | 1.25 ± 0 |",
        "| test accuracy | 0.8125 ± 0.088 | 0.8125 ± 0.088 | 0.5625 ± 0.088 |",
        "| test accuracy − float32's | 0 ± 0 | 0 ± 0 | -0.25 ± 0 |",
        "| validation accuracy after 5 s of training "
        "| 0.3984 ± 0.011 | 0.7891 ± 0.011 | 0.3984 ± 0.011 |",
        "| time in training to validation accuracy 0.7812 [s] "
        "| 10 ± 0 | 5 ± 0 | 8 ± 0 |",
        "| same class as float32 predicts [%] | 100 ± 0 | 100 ± 0 | 87.5 ± 18 |",
    ):
        assert line in markdown.splitlines()
    assert "export" not in markdown and "largest" not in markdown
    html = (tmp_path / "compare.html").read_text()
    assert "<td>87.5 ± 18</td>" in html and "data:image/png;base64," in html
    assert matplotlib.image.imread(tmp_path / "compare.png").shape[1] == 1440


def test_each_run_has_its_flags_and_is_made_once(tmp_path, capsys):
    assert main(tmp_path, seeds="0", policies="float32,mixed_bfloat16") == 0
    assert main(tmp_path, seeds="0,3", policies="float32,mixed_bfloat16") == 0
    out = capsys.readouterr().out
    assert "[1/4] float32 seed 0: done before\n" in out
    assert f"[3/4] float32 seed 3: starts, see {tmp_path}/float32/3.log\n" in out
    for policy in ("float32", "mixed_bfloat16"):
        for seed in (0, 3):
            (start,) = starts(tmp_path, policy, seed)
            assert start.split()[1] == "all"
            assert (tmp_path / policy / f"{seed}.log").read_text() == (
                f"training {policy}\n")
    main(tmp_path / "other", "--mode=train_and_eval", seeds="0", policies="float32")
    assert starts(tmp_path / "other", "float32")[0].split()[1] == "train_and_eval"
    notes = (tmp_path / "other" / "compare.md").read_text()
    assert "One seed: what is chance" in notes and "±" not in notes


def test_another_command_does_not_mix_in(tmp_path, capsys):
    assert main(tmp_path, policies="float32", seeds="0") == 0
    assert main(tmp_path, "--width=9", policies="float32", seeds="0") == 1
    assert capsys.readouterr().err.startswith(
        f"`out` ({tmp_path}) holds a comparison of another command: {FAKE[0]} ")


def test_a_failing_run_names_its_log_and_the_rest_is_kept(tmp_path, capsys):
    assert main(tmp_path, "--fails=mixed_bfloat16", seeds="0") == 1
    assert capsys.readouterr().err == (
        "[2/3] mixed_bfloat16 seed 0 ended with exit code 1; its last line: "
        f"it does not work\nSee {tmp_path}/mixed_bfloat16/0.log; the same command "
        "again goes on from here.\n")
    assert not (tmp_path / "compare.json").exists()
    (tmp_path / "mixed_bfloat16" / "0" / "mended").touch()
    assert main(tmp_path, "--fails=mixed_bfloat16", seeds="0") == 0
    counts = [len(starts(tmp_path, policy)) for policy in POLICIES]
    assert counts == [1, 2, 1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_child_and_the_next_call_goes_on(tmp_path, number, capsys):
    child = tmp_path / "mixed_bfloat16" / "0"

    def send():
        deadline = time.monotonic() + 20
        while not (child / "hangs").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    code = main(tmp_path, "--hangs=mixed_bfloat16", seeds="0")
    sender.join()
    assert code == 130 and "Stopped by" in capsys.readouterr().err
    assert (child / "interrupted").exists()
    pid = int(starts(tmp_path, "mixed_bfloat16")[0].split()[0])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    record = tmp_path / "mixed_bfloat16" / "0.json"
    before = json.loads(record.read_text())
    assert before["exit_code"] == 130
    (child / "mended").touch()
    assert main(tmp_path, "--hangs=mixed_bfloat16", seeds="0") == 0
    assert json.loads(record.read_text())["secs"] > before["secs"] > 0
    assert len(starts(tmp_path, "float32")) == 1


def test_a_child_that_does_not_heed_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "_GRACE_SECS", 0.2)
    text = ("import signal, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
            "open(sys.argv[1], 'w'); time.sleep(100)")

    def send():
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=send).start()
    with pytest.raises(KeyboardInterrupt):
        trials.run_once([sys.executable, "-c", text, str(tmp_path / "ready")],
                        str(tmp_path / "run"), "run")
    assert json.loads((tmp_path / "run.json").read_text())["exit_code"] == -9


def test_a_terminal_sees_the_last_line_of_the_output(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "21")
    text = "import time; print('step 1\\nstep 2 of a long line'); time.sleep(0.5)"
    trials.run_once([sys.executable, "-c", text], str(tmp_path / "run"), "run")
    out = capsys.readouterr().out
    assert "\rrun: step 2 of a lon\r" in out and "starts" not in out
    assert re.search(r"\rrun: \d s {12}\n$", out)


def test_peak_memory_is_the_childs_own(tmp_path):
    text = "import time; bytearray(b'x' * 2**28); time.sleep(1)"
    record = trials.run_once(
        [sys.executable, "-c", text], str(tmp_path / "run"), "run")
    assert 512 < record["peak_memory_mb"] < 600  # two times 256 at once, given back
    assert record["exit_code"] == 0 and 1 < record["secs"] < 10


def test_wrong_flags_and_settings(tmp_path, capsys):
    for flags, message in (
        (["--nothing", "--", "x"], "unrecognized arguments: --nothing.\nSee python -m "
         "mpl.tools.compare --help.\n"),
        (["--policies=float32"], "there is no command after --.\n"),
        (["--", "x", "--seed=3"], "--seed=3 is set by this tool: leave it out after "),
        (["--seeds=0,b", "--", "x"], "invalid integers value: '0,b'.\nSee python"),
        (["--target=a:b", "--", "x"], "invalid metric_and_value value: 'a:b'.\nSee"),
    ):
        with pytest.raises(SystemExit) as end:
            compare.main(flags)
        assert end.value.code == 2 and message in capsys.readouterr().err
    assert main(tmp_path, policies="float32,float99") == 1
    assert capsys.readouterr().err.startswith("`policy` (float99) is not known.\n")
    assert main(tmp_path, command=["no-such-program"]) == 1
    assert "`no-such-program` cannot be run: No such file" in capsys.readouterr().err


def test_the_target(tmp_path, capsys):
    assert main(tmp_path, "--target=accuracy:0.79") == 0
    found = results(tmp_path)["policies"]["mixed_bfloat16"]["secs_to_target"]
    assert found == {"mean": 5.0, "std": None, "values": [None, 5.0]}
    assert "| 10 (1 of 2 seeds) | 5 (1 of 2 seeds) | 8 (1 of 2 seeds) |" in (
        tmp_path / "compare.md").read_text()
    assert main(tmp_path, "--target=loss:0.015") == 0  # lower is better
    found = results(tmp_path)
    assert found["policies"]["float32"]["secs_to_target"]["values"] == [10, 10]
    assert found["policies"]["float32"]["at_equal_time"]["values"] == [0.02, 0.02]
    assert main(tmp_path, "--target=loss") == 0
    assert results(tmp_path)["target"] == 0.01  # the worst of float32 at its end
    capsys.readouterr()
    assert main(tmp_path, "--target=bleu:0.5") == 1
    assert capsys.readouterr().err.startswith(
        "`target` (bleu) must name a metric of the runs: accuracy, loss.\n")


def test_without_float32_the_first_policy_is_the_reference(tmp_path):
    assert main(tmp_path, policies="mixed_float16,mixed_bfloat16", seeds="0") == 0
    found = results(tmp_path)
    assert found["reference"] == "mixed_float16"
    assert found["policies"]["mixed_bfloat16"]["speedup"]["values"] == [1.6]


def test_spread():
    assert spread([1.0, 2.0, None, 3.0, math.nan]) == {
        "mean": 2.0, "std": 1.0, "values": [1.0, 2.0, None, 3.0, None]}
    assert spread([None]) == {"mean": None, "std": None, "values": [None]}


def test_agreement():
    classes = np.array([[0.1, 0.9], [0.6, 0.4], [0.3, 0.7], [0.2, 0.8]])
    other = np.array([[0.2, 0.8], [0.4, 0.6], [0.3, 0.7], [0.2, 0.8]])
    share, most = agreement({"p": classes}, {"p": other})
    assert share == 0.75 and math.isnan(most)
    share, most = agreement({"p": np.array([1.0, 2.0])}, {"p": np.array([1.5, 1.75])})
    assert math.isnan(share) and most == 0.5
    several = {"p": classes, "label": np.array([1, 2]), "x": np.zeros([2, 3, 3])}
    others = {"p": other, "label": np.array([1, 3]), "x": np.full([2, 3, 3], -2.0)}
    assert agreement(several, others) == (0.5, 2.0)
    assert all(map(math.isnan, agreement({}, {"p": classes})))
    assert all(map(math.isnan, agreement({"p": classes}, {"p": classes[:3]})))


@pytest.mark.parametrize("shape, is_fixed", [([3], True), ([None], False)])
def test_exports_are_timed(tmp_path, shape, is_fixed):
    module = tf.Module()
    module.weight = tf.Variable(2.0)
    export_saved_model(
        module, lambda features: features["x"] * module.weight,
        {"x": tf.TensorSpec(shape, tf.float32)}, tmp_path / "export", run="toy",
        info={"policy": "float32"})
    found = [comparison.Trial("float32", 0, Run(str(path), "", {}, []), {})
             for path in (tmp_path, tmp_path / "without")]
    comparison.time_exports(found)
    assert found[1].measured == {}
    if not is_fixed:
        assert found[0].measured == {}
        return
    assert found[0].measured.pop("computes_in") == "float32"
    assert list(found[0].measured) == ["predict_1_ms", "predict_256_ms"]
    assert all(0 < value < 1000 for value in found[0].measured.values())


def test_a_goal_needs_a_common_metric(tmp_path):
    assert main(tmp_path, policies="float32", seeds="0") == 0
    (tmp_path / "float32" / "0" / "metrics.jsonl").write_text(
        '{"step": 1, "split": "test"}\n')
    with pytest.raises(ConfigError, match="no metric in common"):
        compare.run(FAKE, ["float32"], [0], str(tmp_path))


def test_no_process_is_left(tmp_path):
    assert main(tmp_path, policies="float32", seeds="0") == 0
    listed = subprocess.run(
        ["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, timeout=10)
    assert listed.stdout == ""
