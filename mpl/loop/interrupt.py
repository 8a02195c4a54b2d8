"""Ctrl-C as a request."""

import signal
import threading
from typing import Any

from absl import logging


class Interrupt:
    """A context in which the first Ctrl-C is a request and the second acts at once.

    It listens in the main thread only, and not where interrupts are ignored.

    Attributes:
        requested: Whether there was a Ctrl-C since the context was entered.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> None:
        self.requested, self._previous = False, signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread():
            self._previous = None
        if callable(self._previous):
            signal.signal(signal.SIGINT, self._request)

    def __exit__(self, *_: Any) -> None:
        if callable(self._previous):
            signal.signal(signal.SIGINT, self._previous)

    def _request(self, signum: int, frame: Any) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, self._previous)
        logging.warning("Interrupted: training ends after this block of steps.")
