"""--jit_compile=auto: both kinds of step are tried in training, the faster one stays."""

import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import tensorflow as tf
from absl import logging

from mpl.experiment import Experiment

FILE = "jit_compile.json"
# Of training that is left. Compiling takes seconds to minutes and cannot be broken off:
# a minute is won back here by steps that are a tenth faster.
REPAYS_SECS = 600.0
_PART_SECS, _PARTS, _GAIN = 1.0, 5, 0.95

_Parts = Generator[tuple[bool, int], float, None]


class JitTrial:
    """Says which steps of a run are compiled.

        uncompiled to the end of the second block
        if the steps left take REPAYS_SECS or more:
            one compiled step                               # mostly compilation
            5 × (a second compiled, as many steps uncompiled)   # medians are compared
        the faster kind; uncompiled if compiled steps take more than 95 % of the time

    These are the run's own steps: their order and their data stay as they are.

    Args:
        train_steps: Length of the training.
        switches: (step, whether the steps from it on are compiled) of a trial made
            before; its steps are compiled as they were, so that all bits repeat.
        remember: Called with switches and the reason when a trial is over.
        clock: Gives seconds.
    """

    def __init__(
        self, train_steps: int, switches: Sequence[tuple[int, bool]] = (),
        remember: Callable[[list, str], Any] = lambda switches, why: None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._train_steps, self._switches = train_steps, list(switches or [(0, False)])
        self._remember, self._clock, self._step = remember, clock, 0
        self._trial: _Parts | None = None if switches else self._try()
        self._part = next(self._trial) if self._trial else (False, 0)

    def run(
        self, step: int, num_steps: int, run_part: Callable[[int, bool], int],
        set_back: Callable[[int], Any],
    ) -> int:
        """Runs a block of steps in parts, and returns how many steps it made.

        Args:
            step: `global_step`.
            num_steps: Length of the block.
            run_part: Called with a number of steps and whether they are compiled;
                returns how many were made; if fewer, the block ends.
            set_back: Called with the step at which a step failed that is run again.
        """
        self._step, end = step, step + num_steps
        made = wanted = 0
        while self._step < end and made == wanted:
            compiled, most = self._part if self._trial else self._known()
            wanted, start = min(most, end - self._step), self._clock()
            if compiled != self._switches[-1][1] and self._trial:
                self._switches.append((self._step, compiled))
            try:
                made = run_part(wanted, compiled)
            except Exception as error:
                if self._trial is None:
                    raise
                self._go_on(self._trial.throw, error)  # raises what is not for the trial
                set_back(self._step)
                made = wanted
                continue
            self._step += made
            if self._trial and made:
                secs = (self._clock() - start) / made
                self._go_on(self._trial.send, secs)
        return self._step - step

    def _go_on(self, resume: Callable, value: Any) -> None:
        try:
            self._part = resume(value)
        except StopIteration:
            self._trial = None

    def _known(self) -> tuple[bool, int]:
        """Returns what the switches say of the next steps, and of how many."""
        compiled = [kind for step, kind in self._switches if step <= self._step][-1]
        coming = [step for step, _ in self._switches if step > self._step]
        return compiled, min(coming, default=sys.maxsize) - self._step

    def _try(self) -> _Parts:
        """Yields the next part (kind, most steps), and is sent its seconds a step."""
        yield False, sys.maxsize  # traced in it
        secs = yield False, sys.maxsize
        left = (self._train_steps - self._step) * secs
        if left < REPAYS_SECS:
            _say(False, f"the {left:.0f} s left would not repay a trial")
            return
        try:
            compilation = yield True, 1
        except Exception as error:
            return self._decide(False, f"XLA failed: {str(error).splitlines()[0]}")
        count = max(1, round(_PART_SECS / secs))
        times: dict[bool, list[float]] = {True: [], False: []}
        for number in range(2 * _PARTS):
            kind = number % 2 == 0
            times[kind].append((yield kind, count))
        ms = {kind: 1e3 * statistics.median(secs) for kind, secs in times.items()}
        self._decide(
            ms[True] <= _GAIN * ms[False],
            f"{ms[True]:.4g} ms a step compiled, {ms[False]:.4g} uncompiled, "
            f"{compilation:.1f} s of compilation")

    def _decide(self, compiled: bool, why: str) -> None:
        if compiled != self._switches[-1][1]:
            self._switches.append((self._step, compiled))
        _say(compiled, why)
        self._remember(self._switches, why)


def trial_of(experiment: Experiment, path: str) -> JitTrial | None:
    """Returns the trial of a run with its folder; None where nothing is to be tried."""
    config = experiment.config
    if config.jit_compile != "auto":
        return None
    replicas = experiment.strategy.num_replicas_in_sync
    obstacles = {
        f"of {replicas} replicas": replicas > 1,
        "of --debug_eager": config.debug_eager,
        "of --deterministic": config.deterministic,
        "`train_step` is the experiment's own":
            type(experiment).train_step is not Experiment.train_step,
    }
    if obstacle := next((words for words, there in obstacles.items() if there), None):
        _say(False, f"because {obstacle}")
        return None
    file, key = os.path.join(path, FILE), _key(experiment)
    choices = _read(file)

    def remember(switches: list, why: str) -> None:
        choices[key] = {"switches": switches, "why": why}
        try:
            with tf.io.gfile.GFile(file + ".new", "w") as new:
                new.write(json.dumps(choices, indent=1))
            tf.io.gfile.rename(file + ".new", file, overwrite=True)
        except (OSError, tf.errors.OpError) as error:
            logging.warning("%s is not written: %s", file, error)

    known = choices.get(key, {"switches": []})
    if known["switches"]:
        _say(known["switches"][-1][1], f"as measured before: {known['why']}")
    return JitTrial(experiment.train_steps, known["switches"], remember)


def _say(compiled: bool, why: str) -> None:
    logging.info("jit_compile auto: %s, %s", ["uncompiled", "compiled"][compiled], why)


def _key(experiment: Experiment) -> str:
    """Returns what the times depend on, in words."""
    config, shapes = experiment.config, []
    for weights in tf.nest.flatten(experiment.weights):
        shapes += [f"{entry.key} {entry.value.shape}" for entry in weights.entries]
    model = hashlib.sha256("\n".join(shapes).encode()).hexdigest()[:16]
    return (
        f"{_devices()}, TensorFlow {tf.__version__}, {experiment.policy.name}, batch "
        f"{config.global_batch_size} in {config.accumulate_steps}, model {model}")


def _devices() -> str:
    gpus = tf.config.list_physical_devices("GPU")
    details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
    names = [str(detail.get("device_name", "GPU")) for detail in details]
    return " + ".join(names) or f"{os.cpu_count()} × {_processor()}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = (line for line in lines if line.startswith("model name"))
            return next(names, "CPU").partition(": ")[2].strip() or "CPU"
    except OSError:  # not Linux
        return "CPU"


def _read(file: str) -> dict[str, Any]:
    """Returns the choices in a file; none if there is no such file, or it is broken."""
    try:
        with tf.io.gfile.GFile(file) as text:
            choices = json.loads(text.read())
        return {key: {"why": str(choice["why"]), "switches": [
            (int(step), bool(kind)) for step, kind in choice["switches"]]}
            for key, choice in choices.items()}
    except (OSError, tf.errors.OpError, ValueError, KeyError, TypeError, AttributeError):
        return {}
