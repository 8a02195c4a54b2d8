"""How far a run is, in lines on the screen."""

import atexit
import datetime
import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

# Values of a train report that describe the step, not the model.
_OF_THE_STEP = frozenset(
    ("loss_scale", "applied_steps", "skipped_steps", "grad_norm", "learning_rate",
     "steps_per_sec")
)


class Progress:
    """Shows each report in one line.

    On a terminal with rich installed, training is one live line under the lasting
    ones; elsewhere every line lasts. With `batches_per_epoch`, the end of an epoch is
    one line with train and validation beside each other. A reporter of the loop.

    Args:
        global_batch_size: Examples a step.
        batches_per_epoch: Steps an epoch, in a run counted in epochs; None: in steps.
        file: Where the lines go; None: standard output.
    """

    def __init__(
        self,
        *,
        global_batch_size: int,
        batches_per_epoch: int | None = None,
        file: TextIO | None = None,
    ):
        self._global_batch_size = global_batch_size
        self._per_epoch = batches_per_epoch
        self._file = file or sys.stdout
        self._total_steps: int | None = None
        self._values: Mapping[str, Any] = {}
        self._speed = ""
        self._open_epoch: int | None = None  # the step that ended an epoch, unshown yet
        self._live: Any = None

    def start(self, step: int, total_steps: int | None) -> None:
        """Opens the live line, where there can be one."""
        self._total_steps = total_steps
        self._live = _live_line(self._file)

    def train(
        self, step: int, values: Mapping[str, Any], steps_per_sec: float | None
    ) -> None:
        """Shows step, loss, metrics, examples/s, time left, loss scale and skips."""
        self._close_epoch()
        self._values, self._speed = values, self._tail(step, values, steps_per_sec)
        if self._ends_epoch(step):
            self._open_epoch = step  # its line waits for the validation of this step
        else:
            self._show(f"{self._place(step)}  {_joined(values)}  {self._speed}")

    def evaluation(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Shows the result of one evaluation, at an epoch's end beside training's."""
        if self._ends_epoch(step) and split == "validation" and self._values:
            self._open_epoch = step
            self._close_epoch(f" | validation: {_joined(values)}")
        else:
            self._close_epoch()
            self._show(f"{self._place(step)}  {split}: {_joined(values)}", lasting=True)

    def finish(self, step: int) -> None:
        """Ends the live line."""
        self._close_epoch()
        if self._live is not None:
            self._live.stop()
            atexit.unregister(self._live.stop)
            self._live = None

    def _ends_epoch(self, step: int) -> bool:
        return self._per_epoch is not None and step % self._per_epoch == 0

    def _close_epoch(self, validation: str = "") -> None:
        if self._open_epoch is not None:
            place, train = self._place(self._open_epoch), _joined(self._values)
            line = f"{place}  train: {train}{validation} | {self._speed}"
            self._open_epoch = None
            self._show(line, lasting=True)

    def _place(self, step: int) -> str:
        """Returns how far the run is: `step 40/100` or `epoch 1.5/10`."""
        unit, per_unit = ("epoch", self._per_epoch) if self._per_epoch else ("step", 1)
        done = f"{math.floor(10 * step / per_unit) / 10:.10g}"
        if self._total_steps is None or self._total_steps < 0:
            return f"{unit} {done}"
        return f"{unit} {done}/{math.ceil(self._total_steps / per_unit)}"

    def _tail(
        self, step: int, values: Mapping[str, Any], steps_per_sec: float | None
    ) -> str:
        parts = []
        if steps_per_sec and math.isfinite(steps_per_sec):
            parts.append(f"{steps_per_sec * self._global_batch_size:,.0f} examples/s")
            if self._total_steps is not None and self._total_steps >= step:
                left = round((self._total_steps - step) / steps_per_sec)
                parts.append(f"ETA {datetime.timedelta(seconds=left)}")
        for name, label in (("loss_scale", "scale"), ("skipped_steps", "skips")):
            if name in values:
                parts.append(f"{label} {float(values[name]):,.10g}")
        return "  ".join(parts)

    def _show(self, line: str, lasting: bool = False) -> None:
        if self._live is None:
            print(line.rstrip(), file=self._file, flush=True)
        elif lasting:
            self._live.console.print(line, soft_wrap=True)
        else:
            self._live.update(line, refresh=True)


def tracked(batches: Iterable, total: int | None, text: str) -> Iterable:
    """Returns batches that move a bar, where output is a terminal and rich is there."""
    if not sys.stdout.isatty():
        return batches
    try:
        from rich.progress import track
    except ImportError:
        return batches
    return track(batches, text, total)


def _joined(values: Mapping[str, Any]) -> str:
    shown = [
        f"{name} {float(value):.4g}"
        for name, value in values.items()
        if name not in _OF_THE_STEP and getattr(value, "shape", ()) == ()
    ]
    return "  ".join(shown)


def _live_line(file: TextIO) -> Any:
    """Returns a started live line of rich; None where lines must last."""
    if not file.isatty():
        return None
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError:
        return None
    console = Console(file=file, markup=False, highlight=False, emoji=False)
    if console.is_dumb_terminal:
        return None
    live = Live(console=console, auto_refresh=False, transient=True)
    live.start()
    atexit.register(live.stop)  # an exception must not leave the cursor hidden
    return live
