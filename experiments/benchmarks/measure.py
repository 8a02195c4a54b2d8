"""Times systems side by side: fresh processes for starts, blocks in turn for steps.

    for each start, for each run:      a fresh process, nothing else at work:
        seconds to the end of the first step; peak memory after 16 steps
    (runs that are to start less often start two at a time, and are not timed at it)
    keep the last process of each run; compare their losses after 16 steps
    for each round, for each run in turn, another one first each time:
        milliseconds of a step, in a block of as many steps for all
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import queue
import subprocess
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

LOSS_STEPS = 16  # losses are compared and memory is read after so many
ANSWER_SECS = 900.0  # the longest wait for a worker
# `fit` is fastest in whole executions of many steps: so many in long blocks, so many in
# short ones.
_MULTIPLES = (64, 16)
_RESAMPLES = 2000


class Run(NamedTuple):
    """One system on one work; as a string "cnn float32 none mpl"."""

    work: str
    policy: str
    scaling: str
    system: str

    def __str__(self) -> str:
        return " ".join(self)


@dataclasses.dataclass
class Record:
    """What was measured of a run.

    Attributes:
        facts: what the worker says of itself: parameters, batch_size ...
        first_steps_s: seconds from process start to the end of the first step.
        builds_s: the same without the imports, of which TensorFlow's is the same for
            all: model, optimizer, data, trace, first step.
        rss_mb: peak resident memory of each process, in MB of 10⁶ bytes.
        allocator_mb: peak of the device's allocator, where the device tells.
        first_loss: of the first batch, after one step.
        loss: of the first batch, after `LOSS_STEPS` steps.
        ms: milliseconds of one step ("steps") and of one update alone ("update"), a
            value a round.
        counts: steps or updates in a block.
        checkpoint_s: seconds for which each save held up training.
        predict_ms: milliseconds of each prediction for one example.
        matmul_fractions: of the measured rate of matrix products, a value a round.
        side_by_side: name of the group whose blocks were taken in turn with these.
        error: why there is no more; None if all went well.
    """

    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    first_steps_s: list[float] = dataclasses.field(default_factory=list)
    builds_s: list[float] = dataclasses.field(default_factory=list)
    rss_mb: list[float] = dataclasses.field(default_factory=list)
    allocator_mb: list[float] = dataclasses.field(default_factory=list)
    first_loss: float | None = None
    loss: float | None = None
    ms: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    checkpoint_s: list[float] | None = None
    predict_ms: list[float] | None = None
    matmul_fractions: list[float] = dataclasses.field(default_factory=list)
    side_by_side: str = ""
    error: str | None = None

    @property
    def memory_mb(self) -> list[float]:
        """The allocator's peaks where the device tells, else the processes'."""
        return self.allocator_mb or self.rss_mb


Records = dict[Run, Record]


def add_matmul_fractions(records: Records, flops_per_sec: Mapping[str, float]) -> None:
    """Adds to each record the share of the rate of matrix products by dtype."""
    flops: dict[tuple[str, str], float] = {}
    for run, record in records.items():  # one system counts them for all
        if record.facts.get("flops_per_step"):
            flops[run.work, run.policy] = record.facts["flops_per_step"]
    for run, record in records.items():
        rate = flops_per_sec.get(run.policy.removeprefix("mixed_"))
        count = flops.get((run.work, run.policy))
        if rate and count:
            record.matmul_fractions = [
                1e3 * count / ms / rate for ms in record.ms.get("steps", [])]


class Ratio(NamedTuple):
    """A ratio of medians with its 95 % interval; the ends are NaN if unknown."""

    ratio: float
    low: float
    high: float


def ratio_of_medians(
    over: Sequence[float], under: Sequence[float], paired: bool = True
) -> Ratio:
    """Returns median(over) ÷ median(under) and its interval by the bootstrap.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 13.3
    (percentile interval).

    Args:
        over: samples, one a round.
        under: samples, one a round.
        paired: whether samples of equal number were taken in the same round, so that
            rounds are drawn and not samples.
    """
    random = np.random.default_rng(0)
    a, b = np.asarray(over, float), np.asarray(under, float)
    ratio = float(np.median(a) / np.median(b))
    if min(len(a), len(b)) < 3:
        return Ratio(ratio, np.nan, np.nan)
    rounds = random.integers(len(a), size=(_RESAMPLES, len(a)))
    if not (paired and len(a) == len(b)):
        others = random.integers(len(b), size=(_RESAMPLES, len(b)))
    else:
        others = rounds
    ratios = np.median(a[rounds], axis=1) / np.median(b[others], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Ratio(ratio, float(low), float(high))


class WorkerError(Exception):
    """A worker died, hung or answered with an error."""


class Worker:
    """A process that answers requests, one JSON object a line; closed on exit.

    Args:
        command: what starts it.
        log: file for its standard error.
        answer_secs: longest wait for an answer.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: str | os.PathLike[str],
        answer_secs: float = ANSWER_SECS,
    ):
        self._log, self._answer_secs = pathlib.Path(log), answer_secs
        with self._log.open("w") as stderr:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                # Several workers share a GPU; Ctrl-C is ours to pass on.
                env={**os.environ, "TF_FORCE_GPU_ALLOW_GROWTH": "true"},
                start_new_session=True,
            )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        if error:  # Ctrl-C does not wait for a block to end
            self.process.kill()
        self.close()

    def ready(self) -> dict[str, Any]:
        """Waits for the first step and returns what the worker says of itself.

        Raises:
            WorkerError: there is no such answer.
        """
        return self._answer("ready")

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        """Sends a request and returns the answer.

        Raises:
            WorkerError: there is none, or it is an error.
        """
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # it died: `_answer` says how
            print(json.dumps({"do": do, **values}), file=self.process.stdin, flush=True)
        return self._answer(do)

    def _answer(self, event: str) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=self._answer_secs)
        except queue.Empty:
            self.process.kill()
            raise WorkerError(
                f"no answer ({event}) within {self._answer_secs:g} s"
            ) from None
        if not line:
            code = self.process.wait()
            said = self._log.read_text(errors="replace").strip().splitlines()
            raise WorkerError(
                f"ended with code {code} before {event}: {(said or ['no words'])[-1]}"
            )
        try:
            answer = json.loads(line)
            found = answer.pop("event")
        except (ValueError, AttributeError, KeyError):
            raise WorkerError(f"said {line.strip()[:80]!r} for {event}") from None
        if found != event:
            raise WorkerError(answer.get("message", f"said {found} for {event}"))
        return answer

    def close(self) -> None:
        """Ends the process, at the latest by force after 5 s."""
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            print('{"do": "quit"}', file=self.process.stdin, flush=True)
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self.process.kill()
            self.process.wait()


Start = Callable[[Run], Worker]


def measure(
    starts: Mapping[Run, int],
    start: Start,
    *,
    rounds: int,
    block_secs: float,
    updates: bool = False,
    available_mb: Callable[[Record], float] = lambda _: float("inf"),
    say: Callable[[str], None] = print,
) -> Records:
    """Measures runs of one work side by side; no process is left behind.

    Args:
        starts: for each run the number of fresh processes, at least 1.
        start: starts the worker of a run.
        rounds: blocks of each run; 0: measure starts and memory only.
        block_secs: length of a block of the fastest run; three times that for the
            slowest wins if both cannot be had.
        updates: whether the optimizer's update alone is timed, too.
        available_mb: memory of the kind that the record shows. Runs that do not fit
            into it together are timed by policy or, if need be, each alone.
        say: takes lines about the progress.
    """
    records = {run: Record() for run in starts}
    work = next(iter(starts)).work
    for number in range(max(starts.values()) - (rounds > 0)):
        say(f"{work}: start {number + 1} of {max(starts.values())}")
        for run, record in records.items():
            if number < starts[run] - (rounds > 0) and not record.error:
                with start(run) as worker, _noting(record):
                    _begin(worker, record, is_timed=True)
                    worker.process.kill()  # its way out would take half a second
    if rounds > 0:
        for part in _parts(records, available_mb):
            with contextlib.ExitStack() as stack:
                workers = _keep(part, records, starts, start, stack, say)
                for do in ("steps", "update") if updates else ("steps",):
                    _take_blocks(do, workers, records, rounds, block_secs, say)
                _ask_once(workers, records)
    return records


@contextlib.contextmanager
def _noting(record: Record) -> Any:
    """Makes an error of a worker the record's."""
    try:
        yield
    except WorkerError as error:
        record.error = str(error)


def _begin(
    worker: Worker, record: Record, is_timed: bool, is_kept: bool = False
) -> None:
    record.facts = worker.ready()
    if is_timed:
        record.first_steps_s.append(record.facts["first_step_s"])
        record.builds_s.append(record.facts["first_step_s"] - record.facts["import_s"])
    if is_kept:
        record.first_loss = worker.ask("loss")["loss"]
    worker.ask("steps", count=LOSS_STEPS - 1)
    memory = worker.ask("memory")
    record.rss_mb.append(memory["peak_rss_mb"])
    if memory["allocator_peak_mb"] is not None:
        record.allocator_mb.append(memory["allocator_peak_mb"])


def _parts(
    records: Records, available_mb: Callable[[Record], float]
) -> list[list[Run]]:
    """Returns runs in groups of which each fits into memory as far as is known."""
    runs = [run for run, record in records.items() if not record.error]
    policies = dict.fromkeys(run.policy for run in runs)
    splits = [[runs], [[run for run in runs if run.policy == p] for p in policies]]
    for split in splits:
        if all(_share(records, part, available_mb) <= 1 for part in split):
            return split
    return [[run] for run in runs]


def _share(
    records: Records, part: Iterable[Run], available_mb: Callable[[Record], float]
) -> float:
    share = 0.0
    for run in part:
        like = run._replace(scaling="none")  # the one more often started
        record = records[run] if records[run].rss_mb else records.get(like, Record())
        if record.memory_mb:
            share += max(record.memory_mb) / available_mb(record)
    return share


def _keep(
    runs: Sequence[Run],
    records: Records,
    starts: Mapping[Run, int],
    start: Start,
    stack: contextlib.ExitStack,
    say: Callable[[str], None],
) -> dict[Run, Worker]:
    """Starts the last process of each run, which `stack` will close."""
    say(f"{runs[0].work}: last start of {len(runs)} processes, which are kept")
    workers: dict[Run, Worker] = {}
    timed = [run for run in runs if starts[run] == max(starts.values())]

    def begin(run: Run) -> None:
        worker = workers[run] = stack.enter_context(start(run))
        records[run].side_by_side = str(runs[0])
        with _noting(records[run]):
            _begin(worker, records[run], run in timed, is_kept=True)
            records[run].loss = worker.ask("loss")["loss"]

    for run in timed:
        begin(run)
    _two_at_a_time(begin, [run for run in runs if run not in timed], workers)
    return {run: workers[run] for run in runs}


def _two_at_a_time(
    function: Callable[[Run], Any], runs: Iterable[Run], workers: Mapping[Run, Worker]
) -> None:
    """Calls the function for each run, where nothing is timed."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        try:
            list(pool.map(function, runs))
        except BaseException:  # Ctrl-C does not wait for answers
            for worker in list(workers.values()):
                worker.process.kill()
            raise


def _ask_once(workers: Mapping[Run, Worker], records: Records) -> None:
    """Asks for what needs no blocks in turn."""
    whole = [run for run in workers
             if not records[run].error and run.scaling == "none"]
    counting = {run.policy: run for run in whole}.values()  # the same for all systems

    def count_flops(run: Run) -> None:
        with _noting(records[run]):
            records[run].facts |= workers[run].ask("flops")

    _two_at_a_time(count_flops, counting, workers)
    for run in whole:
        with _noting(records[run]):
            saves = workers[run].ask("checkpoint", count=3)["secs"]
            records[run].checkpoint_s = saves
            records[run].predict_ms = workers[run].ask("predict", count=30)["ms"]


def _take_blocks(
    do: str,
    workers: Mapping[Run, Worker],
    records: Records,
    rounds: int,
    block_secs: float,
    say: Callable[[str], None],
) -> None:
    """Times blocks of steps or updates in turn, after one of each to warm up."""
    def prepare(run: Run) -> None:
        with _noting(records[run]):
            workers[run].ask("prepare", count=_MULTIPLES[-1])

    secs_each = {}
    if do == "steps":
        alive = [run for run in workers if not records[run].error]
        _two_at_a_time(prepare, alive, workers)
    for run, worker in workers.items():
        if not records[run].error:
            with _noting(records[run]):
                secs = _secs_each(worker, do, block_secs)
                if secs is not None:
                    secs_each[run] = secs
    if not secs_each:
        return
    count = block_length(secs_each.values(), block_secs)
    runs = list(secs_each)
    blocks = f"{len(runs)} blocks of {count} {do.rstrip('s')}s"
    say(f"{runs[0].work}: {rounds} rounds of {blocks}")
    for number in range(-1, rounds):
        first = number % len(runs)
        for run in runs[first:] + runs[:first]:
            record = records[run]
            if record.error:
                continue
            with _noting(record):
                warms_up = number < 0
                answer = workers[run].ask(
                    do, count=count, settle=warms_up and do == "steps")
                secs, record.counts[do] = answer["secs"], count
                record.facts |= {"steps_per_call": answer.get("steps_per_call", 1)}
                if number >= 0:
                    record.ms.setdefault(do, []).append(1e3 * secs / count)


def _secs_each(worker: Worker, do: str, block_secs: float) -> float | None:
    """Returns about how long a step takes; None if the system has no such thing."""
    secs = worker.ask(do, count=4)["secs"]
    if secs is None:
        return None
    if do == "steps":
        worker.ask(do, count=64 if 16 * secs < 6 * block_secs else 16, settle=True)
    count, secs = 4, 0.0
    while secs < block_secs and count < 10**6:
        count *= 2
        secs = worker.ask(do, count=count)["secs"]
    return secs / count


def block_length(secs_each: Iterable[float], block_secs: float) -> int:
    """Returns how many steps a block has, for steps that take so many seconds."""
    times = list(secs_each)
    count = min(block_secs / min(times), 3 * block_secs / max(times))
    multiple = next((n for n in _MULTIPLES if count >= n), 1)
    return max(multiple, 2, round(count / multiple) * multiple)
