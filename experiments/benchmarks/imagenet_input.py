r"""Does input hold training up? Images per second of reading, of training, of both.

    python -m experiments.benchmarks.imagenet_input --out=runs/imagenet_input
    python -m experiments.benchmarks.imagenet_input --out=runs/imagenet_input \
      --data_dir=/data/imagenet --policy=mixed_bfloat16 --batch_size=1024

Trains `experiments.imagenet_resnet` on random pixels in memory, then on records.
Without --data_dir the records are written first, in ImageNet's form and of its size:
JPEGs of some 500×375 pixels and 110 to 140 KB. What came out is in BUILD_NOTES.md.
"""

import argparse
import functools
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

import mpl
from experiments.imagenet_resnet import Config, ImagenetResnet
from mpl.tools.command_line import Parser, code_of

FILES, PER_FILE = 16, 64
_PICTURES = 64  # different ones
_SHAPES = ((375, 500), (500, 375), (333, 500), (480, 640))
_NOISE, _QUALITY = 14, 95
_TURNS = 3
_HELD_UP = 0.95  # of the speed without input, from which nobody waits


def write_records(folder: pathlib.Path, files: int, per_file: int) -> int:
    """Writes training and validation records in ImageNet's form; returns their bytes.

    The pictures are noise on soft patches of colour, so that they decode as slowly as
    photographs of their size; their labels mean nothing.
    """
    random, pictures = np.random.default_rng(0), []
    for number in range(min(_PICTURES, files * per_file)):
        shape = _SHAPES[number % len(_SHAPES)]
        patches = random.integers(0, 256, (12, 16, 3)).astype(np.float32)
        picture = tf.image.resize(patches, shape, "bicubic")
        picture += random.normal(0, _NOISE, (*shape, 3)).astype(np.float32)
        pixels = tf.cast(tf.clip_by_value(picture, 0, 255), tf.uint8)
        pictures.append(tf.io.encode_jpeg(pixels, quality=_QUALITY).numpy())
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", files), ("validation", 1)):
        for file in range(count):
            path = folder / f"{split}-{file:05}-of-{count:05}"
            with tf.io.TFRecordWriter(str(path)) as writer:
                for number in range(per_file):
                    picture = pictures[(file * per_file + number) % len(pictures)]
                    writer.write(record(picture, int(random.integers(1, 1001))))
    return sum(path.stat().st_size for path in folder.iterdir())


def record(encoded: bytes, label: int) -> bytes:
    """Returns a record with the features that are read; the label is 1 to 1000."""
    features = tf.train.Features(feature={
        "image/encoded": tf.train.Feature(
            bytes_list=tf.train.BytesList(value=[encoded])),
        "image/class/label": tf.train.Feature(
            int64_list=tf.train.Int64List(value=[label]))})
    return tf.train.Example(features=features).SerializeToString()


def measure(config: mpl.RunConfig, data_dir: str, secs: float) -> dict[str, float]:
    """Returns images per second: `training` alone, `input` alone, and `both`."""

    def prepared(**settings: Any) -> ImagenetResnet:
        experiment = ImagenetResnet()
        device = "GPU:0" if tf.config.list_physical_devices("GPU") else "CPU:0"
        own = {name: getattr(config, name) for name in (
            "global_batch_size", "policy", "depth", "width", "image_size",
            "jit_compile")}
        experiment.setup(
            Config(train_epochs=1, **own, **settings),
            tf.distribute.OneDeviceStrategy(device))
        return experiment

    def rate_of(call: Callable[[], object]) -> float:
        return rate(call, config.global_batch_size, secs)

    def train(experiment: ImagenetResnet) -> Callable[[], object]:
        def step() -> None:
            experiment.trainer.train(1)
            experiment.global_step.numpy()

        return step

    with_records = prepared(data_dir=data_dir)
    alone, both = train(prepared(synthetic=True)), train(with_records)
    batches = iter(with_records.pipelines["train"].dataset())
    rates = {"input": rate_of(functools.partial(next, batches))}
    del batches  # it reads ahead
    # In turn, and the best of each: other work on the machine comes and goes.
    turns = [(rate_of(alone), rate_of(both)) for _ in range(_TURNS)]
    rates["training"], rates["both"] = map(max, zip(*turns, strict=True))
    return rates


def rate(
    call: Callable[[], object], images: int, secs: float,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Returns images per second over calls of so many each, after two calls."""
    for _ in range(2):
        call()
    calls, began = 0, clock()
    while (passed := clock() - began) < secs or calls < 3:
        call()
        calls += 1
    return images * calls / passed


def verdict(rates: dict[str, float], cores: int) -> str:
    """Says whether training waits for input, and what would keep it from waiting."""
    share = rates["both"] / rates["training"]
    per_core = rates["input"] / cores
    line = (f"input alone: {rates['input']:.0f} images/s, {per_core:.0f} on each of "
            f"{cores} cores")
    if share >= _HELD_UP:
        return f"Input does not hold training up ({line})."
    return (f"Training waits for input {100 * (1 - share):.0f} % of the time ({line}); "
            f"it takes some {-(-rates['training'] // per_core):.0f} cores to feed it.")


def write(
    out: str, data_dir: str | None, secs: float, batch_size: int, **settings: Any
) -> None:
    """Measures, prints a table, and writes results.json into the folder `out`.

    Raises:
        ConfigError: a setting is wrong, or there are no records.
    """
    config, folder = Config(global_batch_size=batch_size, **settings), pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    if data_dir is None:
        data_dir = str(folder / "records")
        size = write_records(folder / "records", FILES, PER_FILE)
        print(f"synthetic: {(FILES + 1) * PER_FILE} records in ImageNet's form, "
              f"{size / (FILES + 1) / PER_FILE / 1e3:.0f} KB each, in {data_dir}")
    rates = measure(config, data_dir, secs)
    cores = os.cpu_count() or 1
    print("| | images per second |", "|---|---|", sep="\n")
    print(*(f"| {name} | {value:.1f} |" for name, value in rates.items()), sep="\n")
    print(verdict(rates, cores))
    (folder / "results.json").write_text(json.dumps(
        {"images_per_sec": rates, "cores": cores, "batch_size": batch_size,
         "policy": settings["policy"], "depth": settings["depth"]}, indent=2))


def main(argv: Sequence[str] | None = None) -> int:
    """Reads a command line, by default this process's."""
    parser = Parser(
        "python -m experiments.benchmarks.imagenet_input", allow_abbrev=False,
        description="Images per second of reading, of training, of both.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--out", required=True, help="folder for results.json, and records")
    add("--data_dir", help="folder with ImageNet's records; none: they are written")
    add("--policy", default="auto", help="as of experiments")
    add("--depth", default="50", help="layers of the network")
    add("--width", type=int, default=64, help="filters of its first layer")
    add("--image_size", type=int, default=224, help="pixels")
    add("--batch_size", type=int, default=64, help="images in a step")
    add("--secs", type=float, default=20.0, help="time for a figure")
    add("--jit_compile", action="store_true", help="compile the step with XLA")
    return code_of(lambda: write(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    sys.exit(main())
