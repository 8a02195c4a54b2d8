"""--jit_compile=auto: both kinds of step are tried in training, the faster stays."""

import contextlib
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

from mpl.distribute.devices import describe_cpu
from mpl.experiment import Experiment
from mpl.launch import workdir

FILE = "jit_compile.json"
# Of training that is left. Compiling takes seconds to minutes and cannot be broken off:
# a minute is won back here by steps that are a tenth faster.
REPAYS_SECS = 600.0
_PART_SECS, _PARTS, _GAIN = 1.0, 5, 0.95
_Parts = Generator[tuple[bool, int], float | None, None]


class JitTrial:
    """Decides which steps of a run are compiled.

        the first two blocks: uncompiled
        if the steps left take REPAYS_SECS or more:
            one compiled step: nearly all compilation
            5 ×: a second of compiled steps, as many uncompiled ones
        from here on: compiled if the median is 5 % faster

    All of these are the run's own steps; their order and their data stay as they are.

    Args:
        experiment: set up; its own `train_step` must be mpl's.
        switches: (step, whether the steps from it on are compiled) of a trial made
            before: they are compiled as they were, and all bits repeat.
        remember: called with switches and the reason when a trial is over.
        clock: gives seconds.
    """

    def __init__(
        self, experiment: Experiment, switches: Sequence = (),
        remember: Callable[[list, str], Any] = lambda switches, why: None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._experiment, self._remember, self._clock = experiment, remember, clock
        self._switches, self._step = list(switches), int(experiment.global_step)
        self._parts = self._plan()
        self._part = next(self._parts)

    def train(self, train: Callable[[int], Any], num_steps: int) -> int:
        """Runs a block of steps in parts of one kind; returns how many were made.

        Args:
            train: called with the number of steps of a part.
            num_steps: of the block.
        """
        trainer, global_step = self._experiment.trainer, self._experiment.global_step
        self._step = first = int(global_step)
        ahead, end = int(trainer.position) - first, first + num_steps
        while self._step < end:
            compiled, most = self._part
            self._switch(compiled)
            count, start = min(most, end - self._step), self._clock()
            trainer.variant = "compiled" if compiled else ""
            try:
                train(count)
            except Exception as error:
                self._part = self._parts.throw(error)  # raises what the trial does not
                global_step.assign(self._step)  # take; else the step is run again
                trainer.reset_iterator(self._step + ahead)
                continue
            finally:
                trainer.variant = ""  # evaluation is not compiled
            self._step += trainer.steps_done
            if trainer.steps_done < count:
                break
            optimizers = tf.nest.flatten(self._experiment.optimizer)
            is_other = any(optimizer.kept for optimizer in optimizers)  # a step apart
            self._part = self._parts.send(
                None if is_other else (self._clock() - start) / count)
        return self._step - first

    def _plan(self) -> _Parts:
        """Yields kind and most steps of each part, and is sent its seconds a step.

        None: it is not to be timed.
        """
        if not self._switches:
            self._switches = [(0, False)]
            yield from self._try()
        while True:
            coming = [step for step, _ in self._switches if step > self._step]
            yield self._kind(), min(coming, default=sys.maxsize) - self._step

    def _try(self) -> _Parts:
        yield False, sys.maxsize  # traced in it
        secs = yield from _timed(False, sys.maxsize)
        left = (self._experiment.train_steps - self._step) * secs
        if left < REPAYS_SECS:
            return _say(False, f"the {left:.0f} s left would not repay a trial")
        try:
            compilation = yield from _timed(True, 1)
        except Exception as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            return self._decide(False, f"XLA failed: {reason}")
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(_PARTS):
            for kind in times:
                most = max(1, round(_PART_SECS / secs))
                times[kind].append((yield from _timed(kind, most)))
        ms = {kind: 1e3 * statistics.median(each) for kind, each in times.items()}
        self._decide(
            ms[True] <= _GAIN * ms[False],
            f"{ms[True]:.4g} ms a step compiled, {ms[False]:.4g} uncompiled, "
            f"{compilation:.1f} s of compilation")

    def _kind(self) -> bool:
        """Says whether this step is compiled by the switches made so far."""
        return [kind for step, kind in self._switches if step <= self._step][-1]

    def _switch(self, compiled: bool) -> None:
        if compiled != self._kind():
            self._switches.append((self._step, compiled))

    def _decide(self, compiled: bool, why: str) -> None:
        self._switch(compiled)
        _say(compiled, why)
        self._remember(self._switches, why)


def _timed(compiled: bool, most: int) -> Generator[tuple[bool, int], Any, float]:
    while (secs := (yield compiled, most)) is None:
        pass
    return secs


def trial_of(experiment: Experiment, path: str) -> JitTrial | None:
    """Returns the trial of a run in its folder; None where nothing is to be tried."""
    config, strategy = experiment.config, experiment.strategy
    if config.jit_compile != "auto":
        return None
    replicas = strategy.num_replicas_in_sync
    obstacles = {
        f"{replicas} replicas": replicas > 1,
        "its own `train_step`":
            type(experiment).train_step is not Experiment.train_step,
        "parameter servers": isinstance(
            strategy, tf.distribute.ParameterServerStrategy),
        "a TPU": isinstance(strategy, tf.distribute.TPUStrategy),
        "--debug_eager": config.debug_eager, "--deterministic": config.deterministic,
    }  # fmt: skip
    if found := [what for what, is_there in obstacles.items() if is_there]:
        _say(False, f"because of {found[0]}")
        return None
    file, key = os.path.join(path, FILE), _key(experiment)
    choices: dict[str, Any] = {}
    with contextlib.suppress(OSError, tf.errors.OpError, ValueError):
        with tf.io.gfile.GFile(file) as text:
            choices = json.loads(text.read())

    def remember(switches: list, why: str) -> None:
        choices[key] = {"switches": switches, "why": why}
        try:
            workdir.replace(file, json.dumps(choices, indent=1))
        except (OSError, tf.errors.OpError) as error:
            logging.warning("%s is not written: %s", file, error)

    switches = choices[key]["switches"] if key in choices else []
    if switches:
        _say(switches[-1][1], f"as measured before: {choices[key]['why']}")
    return JitTrial(experiment, switches, remember)


def _say(compiled: bool, why: str) -> None:
    logging.info("jit_compile auto: %s, %s", ["uncompiled", "compiled"][compiled], why)


def _key(experiment: Experiment) -> str:
    """Returns what the times depend on."""
    entries = [e for w in tf.nest.flatten(experiment.weights) for e in w.entries]
    shapes = "\n".join(f"{entry.key} {entry.value.shape}" for entry in entries)
    model, config = hashlib.sha256(shapes.encode()).hexdigest()[:16], experiment.config
    batch = f"batch {config.global_batch_size} in {config.accumulate_steps}"
    device = describe_cpu()
    if gpus := tf.config.get_visible_devices("GPU"):  # one replica takes the first
        details = tf.config.experimental.get_device_details(gpus[0])
        device = str(details.get("device_name"))
    version = f"TensorFlow {tf.__version__}"
    return "; ".join([device, version, experiment.policy.name, batch, f"model {model}"])
