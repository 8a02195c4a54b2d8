"""How much of a run's time made steps that it kept."""

import json
import os
import time
from collections.abc import Callable
from typing import Any

import tensorflow as tf


class Goodput:
    """Measures productive ÷ wall time of a run, over all its restarts.

        productive = steps kept × time in training blocks ÷ steps in them
        wall       = time since the run first started, while it was down included
        lost steps = those reported that a restart, from a checkpoint, makes again

    What happens in blocks counts as productive, tracing and histograms included.

    A restart is a start without `finish` before it; the time between a complete
    training and a longer one does not count. The figures are in a small file that is
    replaced at each start and report, so that they are right after a kill, up to what
    came after the last report. The clock of the machine is asked for the time between
    two processes only, and never makes it negative.

    Args:
        path: the file, in a folder that exists.
        clock: gives seconds since 1970.
        timer: gives seconds that never run backwards.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, clock: Callable[[], float] = time.time,
        timer: Callable[[], float] = time.monotonic,
    ):
        self._path, self._clock, self._timer = os.fspath(path), clock, timer
        self._state: dict[str, Any] = {}

    def start(self, step: int) -> None:
        """Training starts at `step`."""
        now = self._clock()
        self._state = state = {
            "first_step": step, "step": step, "lost_steps": 0, "restarts": 0,
            "blocks_steps": 0, "blocks_secs": 0.0, "wall_secs": 0.0, "time": now,
            "ended": True, **self._read()}
        if not state["ended"]:
            state["restarts"] += 1
            state["wall_secs"] += max(0.0, now - state["time"])
        state["lost_steps"] += max(0, state["step"] - step)
        state |= {"step": step, "ended": False}
        self._mark = self._timer()
        self._write()

    def train(self, step: int, steps_per_sec: float | None) -> dict[str, Any]:
        """Training has come to `step`.

        Args:
            step: `global_step`.
            steps_per_sec: steps ÷ time in blocks, since the last call.

        Returns:
            `goodput` (0 ... 1), `lost_steps`, `restarts`, `time` (seconds since 1970).
        """
        state = self._state
        if steps_per_sec:
            state["blocks_secs"] += (step - state["step"]) / steps_per_sec
            state["blocks_steps"] += step - state["step"]
        state["step"] = step
        self._write()
        names = ("lost_steps", "restarts", "time")
        return {"goodput": self.value, **{name: state[name] for name in names}}

    def finish(self) -> None:
        """Training is complete: what follows is not a restart."""
        self._state["ended"] = True
        self._write()

    @property
    def productive_secs(self) -> float:
        """Time in blocks whose steps were kept."""
        state = self._state
        kept = max(0, state["step"] - state["first_step"])
        secs = state["blocks_secs"] * kept / max(1, state["blocks_steps"])
        return min(secs, state["wall_secs"])

    @property
    def value(self) -> float:
        """Productive ÷ wall time."""
        return self.productive_secs / max(self._state["wall_secs"], 1e-9)

    def __str__(self) -> str:
        wall, restarts, lost = (
            self._state[name] for name in ("wall_secs", "restarts", "lost_steps"))
        return (
            f"Goodput {self.value:.2f}: {self.productive_secs:,.0f} s productive of "
            f"{wall:,.0f} s, {restarts:,} restart{'s' * (restarts != 1)}, "
            f"{lost:,} step{'s' * (lost != 1)} lost")

    def _read(self) -> dict[str, Any]:
        try:
            with tf.io.gfile.GFile(self._path) as file:
                return dict(json.load(file))
        except (tf.errors.NotFoundError, ValueError, TypeError):
            return {}

    def _write(self) -> None:
        mark = self._timer()
        self._state["wall_secs"] += mark - self._mark
        self._state["time"], self._mark = self._clock(), mark
        with tf.io.gfile.GFile(f"{self._path}.tmp", "w") as file:
            file.write(json.dumps(self._state))
        tf.io.gfile.rename(f"{self._path}.tmp", self._path, overwrite=True)
