"""What every binary under experiments/ promises: runs, names, commands, the table.

Binaries are found by their files. A new one needs a row in experiments/README.md, and
an entry in SMALL if it is slow.
"""

import ast
import pathlib
import re
import sys

import numpy as np
import pytest
import tensorflow as tf
from test_layout import ROOT, _code_lines

import mpl
from experiments.benchmarks import binaries

NAMES = binaries.names()
# Policies and numbers of replicas; each run goes on where the one before stopped.
POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")
RUNS = [(policy, replicas) for replicas in (1, 2) for policy in POLICIES]
FILES = sorted(
    path for path in (ROOT / "experiments").rglob("*.py")
    if "benchmarks" not in path.relative_to(ROOT).parts)
# "google": protobuf, which TensorFlow brings along.
CORE = {"absl", "experiments", "google", "keras", "mpl", "numpy", "tensorflow"}
EXTRAS = {"matplotlib", "rich", "sklearn", "tensorflow_datasets"}
# Flags with which two steps of a binary take least.
SMALL: dict[str, dict] = {
    "bert": {"layers": 1, "hidden": 16, "heads": 2, "length": 16, "masked": 4,
             "global_batch_size": 64, "warmup_steps": 0},
    "char_lm": {"depth": 1, "width": 16, "heads": 2, "length": 16,
                "global_batch_size": 256, "warmup_steps": 0},
    "cifar_resnet": {"depth": 8},
    "digits": {"hidden": 8},
    "distill": {"hidden": 8},
    "imagenet_resnet": {"synthetic": True, "depth": "14", "width": 4, "image_size": 32},
    "medical": {"filters": 2, "global_batch_size": 128},
    "mnist_mlp": {"hidden": 16},
    "movielens": {"users": 60, "items": 40, "ratings": 2000, "global_batch_size": 256},
    "penalty": {"hidden": 8},
    "sam": {"hidden": 8},
}
# How far a float32 export may be off the training, in units of the largest prediction.
DIFFERENCE = {"float32": 1e-4, "mixed_bfloat16": 0.1, "mixed_float16": 0.02}


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def file_of(name):
    return ROOT / "experiments" / f"{name}.py"


def finite(values):
    return all(np.isfinite(value) for value in values.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_in_each_policy_on_one_device_and_on_two(name, tmp_path, capsys):
    """It trains, evaluates, exports, reloads and predicts; and goes on so."""
    kind, settings = binaries.launched(name)
    settings |= {
        "train_epochs": None, "global_batch_size": 16, "summary_every_steps": 0,
        # With which float16 skips no step.
        "loss_scale": 128.0, "workdir": str(tmp_path / "run"),
        **SMALL.get(name, {})}
    for step, (policy, replicas) in enumerate(RUNS, 1):
        results = mpl.run(
            kind, mode="all", train_steps=step, policy=policy, num_devices=replicas,
            allow_changed_flags=True, **settings)
        out = capsys.readouterr().out
        assert (f"Going on at step {step - 1} of {step}" in out) == (step > 1)
        assert f"{replicas} replica" in out
        train = results.pop("train")
        # They count on over restarts.
        assert (train["applied_steps"], train["skipped_steps"]) == (step, 0)
        assert np.isfinite(train["grad_norm"])
        assert results and all(map(finite, results.values()))
        # Replicas draw each for itself what is random in predictions.
        random = name == "gan_digits" and replicas > 1
        check_predictions(tmp_path / "run", out, 1.0 if random else DIFFERENCE[policy])
        assert tf.saved_model.contains_saved_model(str(tmp_path / "run" / "export"))


def check_predictions(folder, out, most):
    """Checks that there is one for each example, and the export's are the same."""
    with np.load(folder / "predictions.npz", allow_pickle=False) as arrays:
        predictions = dict(arrays)
    count, = re.findall(r"^Predictions for (\d+) examples", out, re.M)
    assert {len(array) for array in predictions.values()} == {int(count)}
    difference, = re.findall(r"largest difference (\S+)$", out, re.M)
    if all(array.dtype.kind == "f" for array in predictions.values()):
        largest = max(float(np.abs(array).max()) for array in predictions.values())
        assert float(difference) <= most * max(1.0, largest)


@pytest.mark.parametrize("name", NAMES)
def test_it_says_how_to_start_it(name):
    text = ast.get_docstring(tree_of(file_of(name)))
    assert re.search(rf"^    python -m experiments\.{name}\b", text, re.M)


@pytest.mark.parametrize("name", NAMES)
def test_it_ends_with_mpl_run(name):
    last = tree_of(file_of(name)).body[-1]
    assert ast.unparse(last).startswith("if __name__ == '__main__':\n    mpl.run(")
    kind, settings = binaries.launched(name)
    assert issubclass(kind, mpl.Experiment) and kind.__module__.endswith(f".{name}")
    config = kind.Config or mpl.RunConfig
    assert set(settings) <= set(config.__dataclass_fields__)
    assert kind.predict is not mpl.Experiment.predict


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_of_mpl_it_uses_public_names_alone(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "mpl":
            assert node.attr in mpl.__all__, f"line {node.lineno}"
        elif isinstance(node, ast.Import):
            assert not any(name.name.startswith("mpl.") for name in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "")[:3] == "mpl":
            assert node.module == "mpl", f"line {node.lineno}"
            assert {name.name for name in node.names} <= set(mpl.__all__)


def roots(nodes):
    """Returns the packages that statements import, by themselves."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_it_needs_the_core_alone_and_extras_where_they_are_used(path):
    tree, always = tree_of(path), CORE | sys.stdlib_module_names
    assert roots(tree.body) <= always
    assert roots(ast.walk(tree)) <= always | EXTRAS


@pytest.mark.parametrize("name", ["gan_digits", "distill", "sam", "penalty"])
def test_a_new_loop_is_short(name):
    assert _code_lines(file_of(name)) <= 60
    kind, _ = binaries.launched(name)
    assert kind.train_step is not mpl.Experiment.train_step


def test_the_table_has_a_row_for_each_binary():
    text = pathlib.Path(ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `python -m experiments\.(\w+)", text, re.M)
    assert [name for name, _ in rows] == [command for _, command in rows]
    assert sorted(name for name, _ in rows) == NAMES
