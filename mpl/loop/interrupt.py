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

    requested = False

    def __enter__(self) -> None:
        self.requested, self._former = False, signal.getsignal(signal.SIGINT)
        is_main = threading.current_thread() is threading.main_thread()
        self._listens = is_main and callable(self._former)
        if self._listens:
            signal.signal(signal.SIGINT, self._request)

    def __exit__(self, *_: Any) -> None:
        if self._listens:
            signal.signal(signal.SIGINT, self._former)

    def _request(self, signum: int, frame: Any) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, self._former)
        logging.warning("Interrupted: training ends after this block of steps.")
