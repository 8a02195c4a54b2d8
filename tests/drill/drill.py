"""What the sections of the drill share: a folder, the undisturbed runs, rows."""

import collections
import dataclasses
import pathlib
import shutil
import threading
import time
from collections.abc import Callable
from typing import Any

from mpl.record import commit
from tests.drill import program
from tests.drill.run import PROGRAM, Run, until


@dataclasses.dataclass
class Row:
    """A line of the table.

    Attributes:
        section: which part of the drill.
        what: was done.
        passed: None: it could not be tried here.
        figures: what was seen, in words.
        details: what was wrong, or more figures.
    """

    section: str
    what: str
    passed: bool | None
    figures: str = ""
    details: Any = ()


Job = Callable[[], Row]


class Drill:
    """A folder of runs.

    Args:
        out: the folder, made empty.
        seed: of all that is drawn by chance.
        steps: length of a run.
        program: what is run.

    Attributes:
        startup_secs: from the start of an undisturbed process to its training, by kind.
    """

    def __init__(
        self, out: pathlib.Path, *, seed: int = 0, steps: int = 2000,
        program: pathlib.Path = PROGRAM,
    ):
        self.out, self.seed, self.steps = out.resolve(), seed, steps
        self._program = program
        self.startup_secs: dict[str, float] = {}
        self._done: dict[str, Run] = {}
        self._locks: dict[str, Any] = collections.defaultdict(threading.Lock)
        shutil.rmtree(self.out / "runs", ignore_errors=True)
        (self.out / "runs").mkdir(parents=True)

    def run(self, name: str, kind: str = "one_device", *flags: str) -> Run:
        """Returns a new run.

        Args:
            name: of its folder.
            kind: one_device; files: it reads its examples from files; mirrored: on two
                logical devices.
            *flags: more of them.
        """
        of_kind = {
            "one_device": ["--strategy=one_device"],
            "files": ["--strategy=one_device", f"--data_dir={self.out / 'data'}"],
            "mirrored": ["--strategy=mirrored", "--num_devices=2"]}[kind]
        return Run(self.out / "runs" / name,
                   (f"--train_steps={self.steps}", *of_kind, *flags), self._program)

    def reference(self, kind: str = "one_device") -> Run:
        """Returns the undisturbed run of a kind; the first call makes it."""
        return self._once(f"undisturbed-{kind}", kind, self._undisturbed)

    def partial(self) -> Run:
        """Returns a run that was killed in its second half, to make copies of."""
        return self._once("partial", "one_device", self._killed)

    def copy(self, name: str, *flags: str) -> Run:
        """Returns a copy of `partial`."""
        run = self.run(name, "one_device", *flags)
        shutil.copytree(self.partial().folder, run.folder, dirs_exist_ok=True)
        return run

    def _once(self, name: str, kind: str, fill: Callable[[Run, str], None]) -> Run:
        with self._locks[name]:
            if name not in self._done:
                run = self.run(name, kind)
                fill(run, kind)
                self._done[name] = run
        return self._done[name]

    def _undisturbed(self, run: Run, kind: str) -> None:
        data = self.out / "data"
        with self._locks["data"]:
            if not data.exists():
                data.mkdir()
                program.write_files(data)
        with run.started() as process:
            self.startup_secs[kind] = until(process, lambda: run.phase() == "training")
            if process.wait():
                raise RuntimeError(f"The undisturbed run failed:\n{run.said()}")

    def _killed(self, run: Run, kind: str) -> None:
        with run.started() as process:
            until(process, lambda: run.committed()[-1:] >= [self.steps * 6 // 10])
            time.sleep(0.05)
        if process.returncode != -9 or len(run.committed()) < 2:
            raise RuntimeError(f"The run was not killed in time:\n{run.said()}")
        for folder in ("checkpoints", "checkpoints/best/loss"):  # what a save left
            for found in commit.find(str(run.folder / folder)):
                commit.remove_files(found.path)  # would be room on a full disk
