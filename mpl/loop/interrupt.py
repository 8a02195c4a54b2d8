"""Ctrl-C and preemption as requests: the step is finished, then the run ends."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Sequence
from typing import Any

from absl import logging

from mpl.errors import Preempted

_REPEAT_SECS = 1.0  # `timeout` and Slurm may send one signal twice
_LISTENING: list["Interrupt"] = []  # of this process


class Interrupt:
    """A context in which the first signal of a kind is a request.

        first:   `requested` says which, and `loops` end after the step under way
        second:  Ctrl-C raises KeyboardInterrupt; another, a second or more later, ends
                 the process at once, with exit code 128 + its number

    It listens in the main thread only, and not to signals that are ignored. Python
    would hear nothing while TensorFlow runs a block of steps; a thread does.

    Args:
        loops: With a boolean variable `halt`, to set to true.
        preemption: Names of the signals beside that of Ctrl-C.

    Attributes:
        requested: The last signal since the context was entered, or None.
    """

    requested: signal.Signals | None = None

    def __init__(
        self, loops: Sequence[Any] = (), preemption: Sequence[str] = ("SIGTERM",)
    ):
        self._loops = tuple(loops)
        self._signals = [signal.SIGINT, *(signal.Signals[name] for name in preemption)]

    @property
    def halted(self) -> bool:
        """Whether loops were told to end."""
        return self.requested is not None and bool(self._loops)

    @property
    def flags(self) -> list[bool]:
        """Whether Ctrl-C, and whether another signal was the last."""
        return [self.requested == signal.SIGINT,
                self.requested not in (None, signal.SIGINT)]

    def __enter__(self) -> None:
        former = {number: signal.getsignal(number) for number in self._signals}
        self._former = {number: handler for number, handler in former.items()
                        if handler not in (None, signal.SIG_IGN)}
        if threading.current_thread() is not threading.main_thread():
            return
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        for number in self._former:
            signal.signal(number, self._request)
        _LISTENING.append(self)

    def __exit__(self, *_: Any) -> None:
        if self in _LISTENING:
            _LISTENING.remove(self)
            self._restore()
            os.write(self._pipe[1], b"\0")
            self._thread.join()
            for end in self._pipe:
                os.close(end)
            for loop in self._loops:
                loop.halt.assign(False)
        self.requested = None

    def _restore(self) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)
        signal.set_wakeup_fd(self._wakeup)

    def _request(self, number: int, frame: Any) -> None:
        self.requested = asked = signal.Signals(number)
        if asked == signal.SIGINT:
            signal.signal(asked, self._former[asked])
        logging.warning("%s: the run ends after this step.", asked.name)

    def _listen(self) -> None:
        first: dict[int, float] = {}
        while 0 not in (numbers := os.read(self._pipe[0], 64)):
            for number in self._former.keys() & set(numbers):
                now = time.monotonic()
                late = now - first.setdefault(number, now) > _REPEAT_SECS
                if late and number != signal.SIGINT:
                    os._exit(128 + number)
                for loop in self._loops:
                    loop.halt.assign(True)
            if self._wakeup >= 0:
                with contextlib.suppress(OSError):
                    os.write(self._wakeup, numbers)


def end_if(flags: Sequence[bool], step: int) -> None:
    """Raises what ends a run after this step, if one of `Interrupt.flags` is set."""
    interrupted, preempted = flags
    if preempted:
        raise Preempted(f"Preempted after step {step}.")
    if interrupted:
        raise KeyboardInterrupt(f"Interrupted after step {step}.")


def _forget() -> None:
    """A process forked from this one ends by its signals, and passes none on."""
    while _LISTENING:
        _LISTENING.pop()._restore()


os.register_at_fork(after_in_child=_forget)
