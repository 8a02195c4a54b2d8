"""Ends a process that hangs, and says where."""

import collections
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

EXIT_CODE = 43
_SLACK = 10  # times as long for what may be traced, compiled or written


class Watchdog:
    """A context that ends the process when nothing moves for `secs`.

        a step, or `enter`, was:      the time begins anew
        nothing for secs:             the stacks of all threads, then exit code 43
        nothing for 10 × secs:        the same, where two steps were not seen yet, which
                                      are traced and compiled, or there are no steps

    Args:
        secs: None: it does nothing.
        end: Called with the exit code.
    """

    def __init__(self, secs: float | None, end: Callable[[int], Any] = os._exit):
        self._secs, self._end = secs, end
        self._now: tuple[str | None, Any, int] = (None, None, 0)
        self._closing = threading.Event()  # of this context

    def enter(self, phase: str | None, loop: Any = None) -> None:
        """Says what begins.

        Args:
            phase: Its name; None: what may take for ever.
            loop: Whose `progress()` tells how far it is; None: nobody knows.
        """
        self._now = phase, loop, self._now[2] + 1

    def __enter__(self) -> None:
        self._closing = threading.Event()
        if self._secs is not None:
            args = self._secs, self._closing
            threading.Thread(target=self._watch, args=args, daemon=True).start()

    def __exit__(self, *_: Any) -> None:
        self._closing.set()

    def _watch(self, secs: float, closing: threading.Event) -> None:
        moves: collections.Counter[str] = collections.Counter()
        seen: tuple[str, int, int] = ("", 0, 0)
        since = time.monotonic()
        while not closing.wait(min(1.0, secs / 10)):
            phase, loop, count = self._now
            variant, steps = loop.progress() if loop else ("", 0)
            kind, now = f"{phase} {variant}".rstrip(), time.monotonic()
            if phase is None or (kind, count, steps) != seen:
                moves[kind] += kind == seen[0] and steps != seen[2]
                seen, since = (kind, count, steps), now
            elif now - since > secs * (1 if moves[kind] > 1 else _SLACK):
                print(f"Nothing moved for {now - since:.0f} s in {kind}; what each "
                      "thread does:", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(sys.__stderr__ or 2)
                return self._end(EXIT_CODE)
