"""A cluster of real processes on this machine.

    python -m mpl.launch.local --workers=2 -- python -m experiments.digits --workdir=w
"""

import argparse
import codecs
import contextlib
import ctypes
import functools
import io
import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from mpl.distribute.devices import nvidia_smi
from mpl.errors import ConfigError

# Below the range from which systems take the ports of outgoing connections.
_PORTS = range(20000, 32000)
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1,
              signal.SIGUSR2)
_print = functools.partial(print, flush=True)
_POLL_SECS = 0.1
_KILL_SECS = 5.0  # between SIGTERM and SIGKILL
_RESTARTS = 10  # of killed workers, all together
_EXAMPLE = (
    "Write python -m mpl.launch.local --workers=2 -- python -m experiments.digits "
    "--workdir=<folder>."
)


def run(
    command: Sequence[str], workers: int, ps: int = 0, *, grace_secs: float = 30.0
) -> int:
    """Runs a command as every process of a cluster, and prints what they print.

        without ps:  the first failure ends all; done when all have exited with 0
        with ps:     a killed worker is started again; done when the chief is

    Each process finds its place in `TF_CONFIG`, leads a group of its own, and sees no
    terminal. Workers share the GPUs evenly; a chief beside them and servers see none.
    SIGINT, SIGTERM and SIGHUP are passed on; a second SIGINT kills. To be called in the
    main thread.

    Args:
        command: the program and its arguments.
        workers: number of workers; without `ps`, worker 0 is the chief.
        ps: number of parameter servers; with them there is a chief, which coordinates.
        grace_secs: how long the others may take to end by themselves after a failure.

    Returns:
        0, or the exit code of the first process to fail; 128 + signal if one killed it.

    Raises:
        ConfigError: a number is out of its range, there are GPUs, but fewer than
            workers, or there is no such program.
    """
    _check(command, workers, ps, grace_secs)
    gpus = _gpus(workers)
    counts = {"chief": min(ps, 1), "worker": workers, "ps": ps}
    ports = iter(free_ports(sum(counts.values())))
    jobs = {job: [f"127.0.0.1:{next(ports)}" for _ in range(count)]
            for job, count in counts.items() if count}
    cluster = _LocalCluster(_RESTARTS if ps else 0, grace_secs)
    with _heard() as signals:
        try:
            for job, addresses in jobs.items():
                for index in range(len(addresses)):
                    config = {"cluster": jobs, "task": {"type": job, "index": index}}
                    environ = {**os.environ, "TF_CONFIG": json.dumps(config),
                               "PYTHONUNBUFFERED": "1"}
                    if gpus:
                        own = gpus[index] if job == "worker" else "-1"
                        environ["CUDA_VISIBLE_DEVICES"] = own
                    cluster.running.append(_Process(job, index, command, environ))
            return cluster.wait(signals)
        finally:
            cluster.kill()


def _check(command: Sequence[str], workers: int, ps: int, grace_secs: float) -> None:
    least = {"workers": (workers, 1), "ps": (ps, 0), "grace_secs": (grace_secs, 0)}
    for name, (value, minimum) in least.items():
        if value < minimum:
            cause = f"`{name}` ({value}) must be at least {minimum}."
            raise ConfigError(cause, f"Write --{name}={max(minimum, 1)}, or more.")
    if not command:
        raise ConfigError("There is no command after `--`.", _EXAMPLE)
    if shutil.which(command[0]) is None:
        cause = f"`{command[0]}` is no program that can be run."
        raise ConfigError(cause, "Correct the command after --.")


def free_ports(count: int) -> list[int]:
    """Returns ports of this machine that nothing listens on, each once."""
    found: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("", port))
            found.append(port)
        if len(found) == count:
            return found
    cause = f"Fewer than {count} ports of {_PORTS[0]} to {_PORTS[-1]} are free."
    raise ConfigError(cause, "Start fewer processes, or end those that hold ports.")


def _gpus(workers: int) -> list[str]:
    """Returns each worker's GPUs as in CUDA_VISIBLE_DEVICES; [] where there are none.

    Raises:
        ConfigError: there are fewer GPUs than workers, which would take each other's
            memory, and between which NCCL does not sum.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        visible = ",".join(map(str, range(len(nvidia_smi()))))
    gpus = [gpu for gpu in visible.split(",") if gpu.strip() not in ("", "-1")]
    share = len(gpus) // workers
    if gpus and not share:
        raise ConfigError(
            f"`workers` ({workers}) must be at most the number of GPUs ({len(gpus)}).",
            "Start fewer, or hide the GPUs from all: CUDA_VISIBLE_DEVICES=-1.")
    return [",".join(gpus[n * share:(n + 1) * share]) for n in range(workers) if gpus]


@contextlib.contextmanager
def _heard() -> Iterator[list[signal.Signals]]:
    """Collects the signals to pass on; those that are ignored stay ignored."""
    signals: list[signal.Signals] = []
    former = {number: signal.getsignal(number) for number in _PASSED_ON}
    former = {number: old for number, old in former.items() if old != signal.SIG_IGN}
    for number in former:
        signal.signal(number, lambda n, _: signals.append(signal.Signals(n)))
    try:
        yield signals
    finally:
        for number, old in former.items():
            signal.signal(number, old)


class _LocalCluster:
    """The processes that run, and what their ends mean."""

    def __init__(self, restarts: int, grace_secs: float):
        self.running: list[_Process] = []
        self._restarts, self._grace_secs = restarts, grace_secs
        self._code: int | None = None  # once it is known
        self._verdict = ""
        self._plan: list[tuple[float, signal.Signals]] = []  # when to send what

    def wait(self, signals: list[signal.Signals]) -> int:
        """Returns what `run` does, once all have ended."""
        interrupts = 0
        while self.running:
            pipes = {process.pipe: process for process in self.running
                     if not process.pipe.closed}
            for pipe in select.select(pipes, [], [], _POLL_SECS)[0]:
                pipes[pipe].show()
            while signals:
                self._restarts, number = 0, signals.pop(0)
                interrupts += number == signal.SIGINT
                _say(f"{number.name} is passed on; a second SIGINT kills.")
                self.pass_on(signal.SIGKILL if interrupts > 1 else number)
            while self._plan and time.monotonic() >= self._plan[0][0]:
                self.pass_on(self._plan.pop(0)[1])
            for process in list(self.running):
                code = process.end()
                if code is not None:
                    self.running.remove(process)
                    self._judge(process, code)
        if self._verdict:
            _say(f"{self._verdict}.")
        return self._code or 0

    def pass_on(self, number: signal.Signals) -> None:
        """Sends a signal to all that run."""
        for process in self.running:
            process.signal(number)

    def kill(self) -> None:
        """Leaves no process behind."""
        self.pass_on(signal.SIGKILL)
        for process in self.running:
            process.popen.wait()
            process.pipe.close()

    def _judge(self, process: "_Process", code: int) -> None:
        if self._code is not None:
            return
        how = f"exit code {code}"
        if code < 0:
            how = f"killed by signal {-code} ({signal.strsignal(-code)})"
        if process.job == "worker" and code < 0 and self._restarts:
            self._restarts -= 1
            _say(f"{process.name}: {how}; it is started again.")
            self.running.append(_Process(*process.start))
        elif code or process.job == "chief":
            self._code = code if code >= 0 else 128 - code
            # Servers and their workers never end by themselves once the chief has.
            grace_secs = 0.0 if process.job == "chief" else self._grace_secs
            now = time.monotonic()
            self._plan = [(now + grace_secs, signal.SIGTERM),
                          (now + grace_secs + _KILL_SECS, signal.SIGKILL)]
            if code:
                self._verdict = f"{process.name} failed first: {how}"
                if self.running and process.job != "chief":
                    _say(f"{self._verdict}; the others have {grace_secs:g} s to end.")


class _Process:
    """One process of the cluster; it leads a group of its own."""

    def __init__(
        self, job: str, index: int, command: Sequence[str], environ: Mapping[str, str]
    ):
        self.job, self.name = job, f"{job} {index}"
        self.start = (job, index, command, environ)
        self._line = ""
        # Each state of a progress line, which ends with \r, becomes a line.
        self._decoder = io.IncrementalNewlineDecoder(
            codecs.getincrementaldecoder("utf-8")("replace"), translate=True)
        self.popen = subprocess.Popen(
            command, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=_never_orphaned())
        assert self.popen.stdout
        self.pipe = self.popen.stdout
        os.set_blocking(self.pipe.fileno(), False)

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.popen.pid, number)

    def show(self) -> bool:
        """Prints the lines that have come; returns whether there may be more."""
        chunk = None
        with contextlib.suppress(BlockingIOError):
            chunk = os.read(self.pipe.fileno(), 2**16)
        *lines, self._line = (
            self._line + self._decoder.decode(chunk or b"", final=chunk == b"")
        ).split("\n")
        for line in lines:
            _print(f"[{self.name}] {line}")
        if chunk == b"":
            self.pipe.close()
        return bool(chunk)

    def end(self) -> int | None:
        """Returns the exit code, or minus a signal, once the process has ended."""
        code = self.popen.poll()
        if code is not None:
            self.signal(signal.SIGKILL)  # what it has started itself
            while not self.pipe.closed and self.show():
                pass
            self.pipe.close()
            if self._line:
                _print(f"[{self.name}] {self._line}")
        return code


def _never_orphaned() -> Callable[[], None] | None:
    """Returns what a child does first, so that it ends if this process is killed."""
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def call() -> None:
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # which was killed before that
            os._exit(1)

    return call


def _say(text: str) -> None:
    _print(f"[local] {text}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError(f"{message}.", "See python -m mpl.launch.local --help.")


def main(argv: Sequence[str] | None = None) -> int:
    """Reads a command line, by default this process's, and runs it."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    parser = _Parser(
        "python -m mpl.launch.local", "%(prog)s --workers=N [--ps=M] -- command ...",
        "Starts a local cluster: the command as each of its processes, with TF_CONFIG.",
        allow_abbrev=False)
    add, shown = parser.add_argument, " (default: %(default)s)"
    add("--workers", type=int, required=True,
        help="workers; without --ps, worker 0 is the chief")
    add("--ps", type=int, default=0,
        help="parameter servers; with them a chief is added" + shown)
    add("--grace_secs", type=float, default=30.0,
        help="seconds the others have to end after a failure" + shown)
    try:
        return run(words[cut + 1:], **vars(parser.parse_args(words[:cut])))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
