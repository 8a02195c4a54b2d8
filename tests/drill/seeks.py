"""How long it takes to go on at a position of the data; as a program, the times.

    python -m tests.drill.seeks <an empty folder>
"""

import json
import os
import statistics
import subprocess
import sys
import time

import numpy as np
import tensorflow as tf

import mpl
from tests.drill import program
from tests.drill.drill import Drill, Row
from tests.drill.run import ROOT

EXAMPLES, BATCH, FILES = 50_000, 16, 20
EPOCH = EXAMPLES // BATCH
# Global batches that were consumed before.
POSITIONS = {"0": 0, "half an epoch": EPOCH // 2, "an epoch - 1": EPOCH - 1,
             "a million epochs": 10**6 * EPOCH,
             "a million epochs and a half": 10**6 * EPOCH + EPOCH // 2}
_REPEATS, _SLACK_SECS = 3, 0.1


class Many(program.Drilled):
    """The drilled training with many examples."""

    folder = ""

    def build_data(self, split, context):
        if split != "train":
            return None
        random = np.random.default_rng(0)
        rows = random.normal(size=(EXAMPLES, program.FEATURES + 1)).astype(np.float32)
        rows[:, -1] = rows[:, -1] > 0
        if not self.folder:
            return {"x": rows[:, :-1], "y": rows[:, -1].astype(np.int32)}
        for number, part in enumerate(np.array_split(rows, FILES)):
            with open(os.path.join(self.folder, f"{number:02}.f32"), "wb") as file:
                file.write(part.tobytes())
        counts = [len(part) for part in np.array_split(rows, FILES)]
        return mpl.FileSource(os.path.join(self.folder, "*.f32"), program.read,
                              examples_per_file=counts, shuffle_buffer=100)


def times(folder: str) -> dict[str, float]:
    """Returns the seconds to the end of the first step at each position."""
    experiment = Many()
    experiment.folder = folder
    config = program.Config(global_batch_size=BATCH, early_stop=None)
    experiment.setup(config, tf.distribute.OneDeviceStrategy("CPU:0"))
    experiment.trainer.train(1)  # traced
    return {name: statistics.median(
        _secs(experiment.trainer, position) for _ in range(_REPEATS))
        for name, position in POSITIONS.items()}


def _secs(trainer: mpl.Trainer, position: int) -> float:
    start = time.perf_counter()
    trainer.reset_iterator(position)
    trainer.train(1)
    return time.perf_counter() - start


def rows(drill: Drill) -> list[Row]:
    """Measures in memory, where it must not matter where, and in files."""
    folder = drill.out / "runs" / "seek"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "tests.drill.seeks", str(folder)], cwd=ROOT, text=True,
        timeout=300, capture_output=True, env={
            **os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3",
            "CUDA_VISIBLE_DEVICES": "-1"})
    if done.returncode:
        return [Row("seek", "all", False, "it failed", done.stderr[-3000:])]
    memory, files = json.loads(done.stdout.splitlines()[-1])
    # Whatever the position, no more is read than an epoch.
    bounds = {"in memory": memory["0"] + _SLACK_SECS,
              "in files": 2 * files["an epoch - 1"] + _SLACK_SECS}
    return [
        Row("seek", f"{where}, {EXAMPLES:,} examples", max(
            seen.values()) <= bounds[where], "; ".join(
                f"{1e3 * secs:.0f} ms at {name}" for name, secs in seen.items()),
            {"secs": seen, "bound_secs": bounds[where]})
        for where, seen in (("in memory", memory), ("in files", files))]


if __name__ == "__main__":
    print(json.dumps([times(""), times(sys.argv[1])]))
