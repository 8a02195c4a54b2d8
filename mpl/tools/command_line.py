"""What the tools' command lines have in common."""

import argparse
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from mpl.errors import CheckpointError, ConfigError


class Parser(argparse.ArgumentParser):
    """Ends the process with two lines and code 2 after a wrong flag."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{message}.\nSee {self.prog} --help.\n")


def code_of(work: Callable[[], object]) -> int:
    """Does the work of a tool; SIGTERM is taken as Ctrl-C.

    Returns:
        The exit code: 0; 1 after an error of mpl, which is printed; 130 after Ctrl-C.
    """
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        work()
        return 0
    except (ConfigError, CheckpointError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped by Ctrl-C or SIGTERM.", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, former)
