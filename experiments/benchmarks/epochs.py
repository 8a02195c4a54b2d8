"""Loss and accuracy after each epoch, on both splits, by policy.

    python -m experiments.benchmarks.epochs --data_dir=mnist [--out=runs/epochs]

Trains experiments.mnist_mlp once under each policy, from the same weights and on the
same batches, and after each epoch evaluates the training images and the test images
with the weights of that moment. Writes epochs.md, epochs.png and epochs.json.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import mpl
from experiments.mnist_mlp import Config, MnistMlp
from mpl import distribute
from mpl.tools import page, plots
from mpl.tools.command_line import Parser, code_of

FIGURES = ("train loss", "train accuracy", "test loss", "test accuracy")
_STYLES: dict[str, dict[str, Any]] = {
    "train": {"linestyle": "--"}, "test": {"linestyle": "-", "marker": "."}}


class BothSplits(MnistMlp):
    """Has the training images in place of the validation images."""

    def build_data(self, split, context):
        return super().build_data("train" if split == "validation" else split, context)


def rows_of(config: mpl.RunConfig) -> tuple[list[dict[str, float]], dict[str, int]]:
    """Trains by these settings.

    Returns:
        `epoch` and the figures after each; the number of images of each split.
    """
    experiment: Any = BothSplits()
    experiment.setup(config, distribute.get_strategy("one_device"))
    rows = []
    for epoch in range(1, (config.train_epochs or 1) + 1):
        experiment.trainer.train(experiment.batches_per_epoch)
        row: dict[str, float] = {"epoch": epoch}
        for split, images in (("train", "validation"), ("test", "test")):
            values = experiment.evaluators[images].evaluate()
            row |= {f"{split} {name}": float(values[name])
                    for name in ("loss", "accuracy")}
        rows.append(row)
    return rows, experiment.num_examples


def markdown(title: str, rows: dict[str, list[dict[str, float]]]) -> str:
    """Returns a table with a row for each epoch, and the figures of each policy."""
    head = ["epoch", *(f"{policy} {name}" for policy in rows for name in FIGURES)]
    lines = [head, ["---:"] * len(head)]
    for epoch, of_policies in enumerate(zip(*rows.values()), 1):
        cells = (f"{row[name]:.4f}" for row in of_policies for name in FIGURES)
        lines.append([str(epoch), *cells])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"# {title}\n\n{table}\n"


def picture(title: str, rows: dict[str, list[dict[str, float]]]) -> bytes:
    """Returns a PNG of the losses and the accuracies."""
    drawn, panels = plots.figure(title, 2)
    # The first is the widest: lines that coincide are all seen.
    lines = {policy: {"color": f"C{i % 10}", "linewidth": 2 * (len(rows) - i)}
             for i, policy in enumerate(rows)}
    for panel, name in zip(panels, ("loss", "accuracy")):
        for policy, of_policy in rows.items():
            epochs = [row["epoch"] for row in of_policy]
            for split, style in _STYLES.items():
                values = [row[f"{split} {name}"] for row in of_policy]
                panel.plot(epochs, values, **lines[policy], **style)
        panel.set(title=name, xlabel="epoch", ylabel=name)
    styles = {split: {"color": "#555555", **style} for split, style in _STYLES.items()}
    plots.legend(drawn, [*lines.items(), *styles.items()])
    return plots.png(drawn)


def write(out: str, policies: Sequence[str], **settings: Any) -> None:
    """Trains under each policy, and writes what came out into the folder `out`.

    Raises:
        ConfigError: a setting is wrong, data cannot be read, or matplotlib is missing.
    """
    plots.check()
    configs = [Config(policy=policy, **settings) for policy in policies]
    rows = {}
    for policy, config in zip(policies, configs):
        rows[policy], num_examples = rows_of(config)
        print(f"{policy}: done", flush=True)
    units = "-".join(map(str, [784, *configs[0].units, 10]))
    images = settings["data_dir"] or "the embedded digits, enlarged"
    title = (f"{units} on {images}: {num_examples['train']:,} training and "
             f"{num_examples['test']:,} test images")
    text = markdown(title, rows)
    page.write(out, {
        "epochs.md": text, "epochs.png": picture(title, rows),
        "epochs.json": json.dumps({"title": title, "policies": rows}, indent=1) + "\n"})
    print(f"\n{text}\nLook at {os.path.join(out, 'epochs.png')}")


def main(argv: Sequence[str] | None = None) -> int:
    """Reads a command line, by default this process's."""
    parser = Parser(
        "python -m experiments.benchmarks.epochs", allow_abbrev=False,
        description="Loss and accuracy of mnist_mlp after each epoch, by policy.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--policies", default="mixed_bfloat16,float32", help="with commas between")
    add("--out", default="runs/epochs", help="folder for the table and the picture")
    add("--data_dir", help="as of mnist_mlp; none: the embedded digits")
    add("--train_epochs", type=int, default=Config.train_epochs, help="rows")
    add("--hidden", default=Config.hidden, help="as of mnist_mlp")
    add("--layers", type=int, help="as of mnist_mlp")
    add("--seed", type=int, default=0, help="of weights and order")
    given = vars(parser.parse_args(argv))
    policies = dict.fromkeys(given.pop("policies").split(","))
    return code_of(lambda: write(policies=list(policies), **given))


if __name__ == "__main__":
    sys.exit(main())
