"""Writes a small project that trains with mpl: an experiment, its test, a README.

    python -m mpl.tools.new ../my_experiment

The folder's name is that of the experiment.
"""

import importlib.util
import keyword
import os
import pathlib
import re
import shlex
import sys
import tempfile
from collections.abc import Sequence

import mpl
from mpl.errors import ConfigError
from mpl.tools.command_line import Parser, code_of

# Whatever bears the name of the project does so as my_experiment or MyExperiment.
FILES = {
    "my_experiment.py": '''\
"""To which of three clouds does a point belong?

    python my_experiment.py --mode=all

trains, evaluates, exports, reloads and predicts, in seconds.
Expected: the last line says `my_experiment: accuracy 0.95` or more.
CHANGE marks what to replace by your own.
"""

import dataclasses

import keras
import numpy as np
import tensorflow as tf

import mpl

CLASSES = 3


class MyExperiment(mpl.Experiment):
    """CHANGE: what is learned, of what."""

    @dataclasses.dataclass(frozen=True)
    class Config(mpl.RunConfig):
        # CHANGE: defaults of flags that --helpfull lists, and flags of your own.
        train_epochs = 5
        learning_rate = 0.01
        hidden: int = mpl.option(32, "Units of the hidden layer.", minimum=1)

    ranges = {"label": (0, CLASSES - 1)}  # CHANGE: lowest and highest value allowed

    def build_data(self, split, context):
        # CHANGE: your arrays, [num_examples, ...] by name, for example read from
        # context.data_dir, which is --data_dir; None: there is no such split.
        random = np.random.default_rng({"train": 1, "validation": 2, "test": 3}[split])
        label = random.integers(0, CLASSES, 1000, dtype=np.int32)
        point = random.normal(size=[1000, 8]).astype(np.float32)
        point[np.arange(1000), label] += 3
        return {"point": point, "label": label}

    def build_model(self):
        # CHANGE: the layers. The last one stays float32 under every --policy.
        return keras.Sequential([
            keras.Input([8]),
            keras.layers.Dense(self.config.hidden, activation="relu"),
            keras.layers.Dense(CLASSES, dtype="float32"),
        ])

    def loss(self, batch, training):
        # CHANGE: one loss for each example, not their mean.
        logits = self.model(batch["point"], training=training)
        losses = keras.losses.sparse_categorical_crossentropy(
            batch["label"], logits, from_logits=True)
        return mpl.LossOutput(losses, batch["weight"], (batch["label"], logits))

    def metrics(self):
        # CHANGE: metrics of (labels, logits); the first one sums up the experiment.
        return {"accuracy": keras.metrics.SparseCategoricalAccuracy()}

    def predict(self, batch):
        # CHANGE: what is wanted of examples without labels.
        return tf.nn.softmax(self.model(batch["point"], training=False))


if __name__ == "__main__":
    mpl.run(MyExperiment)
''',
    "test_my_experiment.py": '''\
"""The splits share no example; the experiment learns and predicts."""

import numpy as np

import mpl
from my_experiment import MyExperiment


def test_no_example_is_in_two_splits():
    parts = [MyExperiment().build_data(split, None)
             for split in ("train", "validation", "test")]
    points = np.concatenate([part["point"] for part in parts])  # CHANGE: a feature
    assert len(np.unique(points, axis=0)) == len(points)


def test_it_learns_and_predicts(tmp_path):
    results = mpl.run(
        MyExperiment, mode="all", workdir=str(tmp_path), policy="float32")
    assert results["test"]["accuracy"] > 0.95  # CHANGE: what can be expected
    label = MyExperiment().build_data("test", None)["label"]
    with np.load(tmp_path / "predictions.npz") as arrays:
        right = arrays["predictions"].argmax(-1) == label
    assert abs(right.mean() - results["test"]["accuracy"]) < 0.01
''',
    "README.md": '''\
# my_experiment

```bash
python my_experiment.py --mode=all    # train, evaluate, export, reload, predict
python my_experiment.py --help        # the flags
python -m pytest                      # the tests
```

`python` is one that has mpl: `python -m pip install -r requirements.txt` brings it.
Replace what is marked CHANGE in `my_experiment.py` and `test_my_experiment.py`. What
each part does is in mpl's docs/new_experiment.md.
''',
}


def write(path: str | os.PathLike[str]) -> pathlib.Path:
    """Writes a project into a new folder, as a whole or not at all.

    Args:
        path: the folder; its name is that of the experiment's module.

    Returns:
        The folder.

    Raises:
        ConfigError: the name is none for a module, or another module has it; the
            folder exists, or cannot be written.
    """
    folder = pathlib.Path(path)
    name = folder.name
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ConfigError(
            f"`name` ({name}) must be small letters, digits and _, begin with a letter "
            "and be no word of Python's own.", "Write for example my_experiment.")
    if os.path.lexists(folder):
        raise ConfigError(
            f"`name` ({folder}) must be a folder that is not there yet.",
            "Give another name, or delete what is there.")
    spec = importlib.util.find_spec(name)
    if spec and spec.origin:  # a mere folder here has none
        raise ConfigError(
            f"`name` ({name}) must not be that of a module that Python has already: "
            f"{spec.origin}.", f"Write for example my_{name}.")
    class_name = "".join(part.capitalize() for part in name.split("_"))

    def named(text: str) -> str:
        text = text.replace("my_experiment", name)
        return text.replace("MyExperiment", class_name)

    files = {named(file): named(text) for file, text in FILES.items()}
    files["requirements.txt"] = f"{_requirement()}\npytest\n"
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
            new = pathlib.Path(beside, name)
            new.mkdir()
            for file, text in files.items():
                (new / file).write_text(text, encoding="utf-8")
            new.rename(folder)
    except OSError as error:
        raise ConfigError(
            f"`name` ({folder}) must be in a folder that takes files: "
            f"{error.strerror}.", "Give the path of another one.") from error
    return folder


def _requirement() -> str:
    """Names mpl as it is here: a clone by its folder, else by its version."""
    root = pathlib.Path(mpl.__file__).resolve().parents[1]
    is_clone = (root / "setup.cfg").exists()
    return f"mpl @ {root.as_uri()}" if is_clone else f"mpl=={mpl.__version__}"


def main(argv: Sequence[str] | None = None) -> int:
    """Reads a command line, by default this process's, and writes the project."""
    parser = Parser(
        "python -m mpl.tools.new", description="Writes a project that trains with mpl.",
        allow_abbrev=False)
    parser.add_argument("name", help="folder to write, such as ../my_experiment")
    given = parser.parse_args(argv)

    def work() -> None:
        folder = write(given.name)
        print(f"Wrote {', '.join(sorted(os.listdir(folder)))} in {folder}")
        command = shlex.join([sys.executable, f"{folder.name}.py", "--mode=all"])
        print(f"Go on: cd {shlex.quote(str(folder))} && {command}")

    return code_of(work)


if __name__ == "__main__":
    sys.exit(main())
