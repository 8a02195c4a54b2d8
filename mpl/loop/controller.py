"""The outer loop: what happens between blocks of steps, and when."""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from mpl.errors import CheckpointError, ConfigError
from mpl.loop.actions import Action, require_positive
from mpl.loop.evaluator import Evaluator
from mpl.loop.inner_loop import EndOfDataError, counter
from mpl.loop.interrupt import Interrupt, end_if
from mpl.loop.summaries import Summaries
from mpl.loop.trainer import Trainer
from mpl.loop.watchdog import Watchdog


class Reporter(Protocol):
    """Hears what a `Controller` does. Override what you want to hear."""

    def start(self, step: int, total_steps: int | None) -> None:
        """Training starts at `step`, up to `total_steps`; None: to the data's end."""

    def train(self, step: int, values: Mapping[str, Any], steps_per_sec: float) -> None:
        """Values of the steps since the last call, at multiples of the log interval.

        Args:
            step: `global_step`.
            values: Numbers and NumPy arrays by name.
            steps_per_sec: Steps ÷ time in blocks, since the last call.
        """

    def evaluation(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Results of the evaluation set `split`, and `steps_per_sec` of evaluation."""

    def finish(self, step: int) -> None:
        """Training ended or failed at `step`."""


class Controller:
    """Trains in blocks of steps; logs, evaluates and saves between them (as in Orbit).

        while global_step < steps:
            trainer.train(steps to the nearest multiple of any interval)
            train actions
            at multiples of log_every_steps:          reporters, metrics begin anew
            at multiples of summary_interval:         summaries
            at multiples of eval_every_steps:         evaluation, eval actions
            at multiples of checkpoint_every_steps:   a checkpoint
        and at the end each of these that was not just done, summaries aside

    Multiples are of `global_step`, so a resumed run keeps the cadence. Nothing is
    restored by the constructor: call `restore_checkpoint`.

    The first Ctrl-C or SIGTERM (in the main thread) ends training and evaluation after
    the step under way; then a checkpoint is saved, and `KeyboardInterrupt` or
    `Preempted` is raised. The second acts at once, see `Interrupt`. An evaluation that
    it breaks off has no results; a resumed run makes it first, if the checkpoint holds
    `evaluation_due`. With `agree` blocks and evaluations are not broken off.

    Args:
        global_step: int64 variable; `train_step` adds 1 to it, the controller reads it.
        trainer: Runs the blocks.
        evaluator: One, or several by the name of their evaluation set.
        strategy: In whose scope checkpoints are restored.
        train_actions: Called with the output of each block.
        eval_actions: Called with the output of each evaluation, as `evaluate` returns
            it. While an action of either kind says `stopped`, nothing is trained.
        steps_per_loop: No block crosses its multiples: the most steps between two looks
            at the host.
        log_every_steps: None: `steps_per_loop`.
        eval_every_steps: None: `train_and_evaluate` evaluates at the end only.
        checkpoint_manager: A `tf.train.CheckpointManager`, or another object with
            `directory`, `save(step)` and `restore(path or None)`; if it writes in the
            background, with `check()` and `wait()`, which raise what went wrong there.
        checkpoint_every_steps: None: the manager's `checkpoint_interval` if it has one,
            else at the end only.
        checkpoint_every_secs: Also at a block's end when so many seconds have passed
            since the last checkpoint.
        summary_interval: Also for `tf.summary` calls in `train_step`. None:
            `log_every_steps`.
        summary_dir: Where summaries of training are written, for TensorBoard.
        eval_summary_dir: Where those of evaluation are, a folder for each set; None:
            in `summary_dir`. One evaluator without a name is of the set "validation".
        rewrite_summaries: Delete there what this run writes again; False beside another
            process that writes.
        reporters: Hear of values and results.
        after_restore: Called when a checkpoint was restored.
        agree: Called with booleans by which this process wants to stop; returns for
            each whether any process that trains in step does. None: it is alone.
        interrupt: One that is entered already; None: training enters its own.
        watchdog: Told what goes on; None: nobody is.
        evaluation_due: int64 variable, 1 where an evaluation was left out; None: a new
            one.
        clock: Gives seconds.

    Attributes:
        stop_training: Set it to True to end training after the block.
    """

    def __init__(
        self, *, global_step: tf.Variable, trainer: Trainer | None = None,
        evaluator: Evaluator | Mapping[str, Evaluator] | None = None,
        strategy: tf.distribute.Strategy | None = None,
        train_actions: Sequence[Action] | None = None,
        eval_actions: Sequence[Action] | None = None,
        steps_per_loop: int = 100, log_every_steps: int | None = None,
        eval_every_steps: int | None = None, checkpoint_manager: Any = None,
        checkpoint_every_steps: int | None = None,
        checkpoint_every_secs: float | None = None, summary_interval: int | None = None,
        summary_dir: str | None = None, eval_summary_dir: str | None = None,
        rewrite_summaries: bool = True,
        reporters: Sequence[Reporter] = (),
        after_restore: Callable[[], Any] = lambda: None,
        agree: Callable[[Sequence[bool]], Sequence[bool]] | None = None,
        interrupt: Interrupt | None = None, watchdog: Watchdog | None = None,
        evaluation_due: tf.Variable | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        require_positive(
            steps_per_loop=steps_per_loop, log_every_steps=log_every_steps,
            eval_every_steps=eval_every_steps, summary_interval=summary_interval,
            checkpoint_every_steps=checkpoint_every_steps,
        )
        interval = getattr(checkpoint_manager, "checkpoint_interval", None)
        self._steps_per_loop, self._eval_every = steps_per_loop, eval_every_steps
        self._log_every = log_every_steps or steps_per_loop
        self._summary_every = summary_interval or self._log_every
        self._save_every = checkpoint_every_steps or interval
        self._save_secs = checkpoint_every_secs or math.inf
        self.global_step, self.strategy = global_step, strategy
        self.trainer: Any = trainer
        self.evaluator: Any = evaluator
        self.train_actions, self.eval_actions = train_actions or (), eval_actions or ()
        self.checkpoint_manager, self.reporters = checkpoint_manager, tuple(reporters)
        self._summaries = Summaries(
            global_step, summary_dir, eval_summary_dir, rewrite_summaries)
        self._after_restore, self._clock = after_restore, clock
        self._agree = agree or (lambda flags: flags)
        runners = [each for each in (trainer, *_named(evaluator).values()) if each]
        self._interrupt = interrupt or Interrupt(
            [] if agree else [each.loop for each in runners])
        self._context: Any = contextlib.nullcontext() if interrupt else self._interrupt
        self._watchdog = watchdog or Watchdog(None)
        self.evaluation_due = counter() if evaluation_due is None else evaluation_due
        self.stop_training = False
        self._saved_at: int | None = None
        self._saved_time = clock()

    def train(self, steps: int, checkpoint_at_completion: bool = True) -> None:
        """Trains until `global_step` is `steps`; -1: to the end of the data.

        Raises:
            EndOfDataError: The data ended before; what was trained is saved.
            NonFiniteError: The trainer gave up, see `Trainer.nonfinite_error`.
            ConfigError: `global_step` did not advance by 1 a step.
        """
        self._run(steps, checkpoint_at_completion)

    def train_and_evaluate(
        self, train_steps: int, eval_steps: int = -1, eval_interval: int | None = None
    ) -> dict[str, Any]:
        """Trains as `train` does; evaluates at multiples of an interval and at the end.

        Args:
            train_steps: Value of `global_step` to train to; -1: to the end of the data.
            eval_steps: Steps of an evaluation; -1: all of the data.
            eval_interval: Steps between evaluations; None: `eval_every_steps`.

        Returns:
            The last results, as `evaluate` does.
        """
        self._need("evaluator")
        evaluate = functools.partial(self.evaluate, eval_steps)
        return self._run(train_steps, True, evaluate, eval_interval or self._eval_every)

    def evaluate(self, steps: int = -1) -> dict[str, Any]:
        """Evaluates the model as it is.

        Args:
            steps: Steps for each evaluation set; -1: all of its data.

        Returns:
            Results by name, numbers and NumPy arrays ("a/b" for nested ones); with
            evaluators by name a dict of them by that name; {} if it was broken off.
        """
        named, results = isinstance(self._need("evaluator"), Mapping), {}
        for split, evaluator in _named(self.evaluator).items():
            step, start = int(self.global_step.numpy()), self._clock()
            self._watchdog.enter(f"evaluation of {split}", evaluator.loop)
            with self._summaries.to(split):
                output = evaluator.evaluate(tf.constant(steps, tf.int64))
            if self._interrupt.halted:
                self.evaluation_due.assign(1)
                return {}
            results[split] = _on_host(output)
            speed = evaluator.steps_done / max(self._clock() - start, 1e-9)
            values = {**results[split], "steps_per_sec": speed}
            self._summaries.write(split, values)
            for reporter in self.reporters:
                reporter.evaluation(step, split, values)
        output = results if named else results["validation"]
        self._watchdog.enter("actions after an evaluation")
        for action in self.eval_actions:
            action(output)
        return output

    def evaluate_continuously(
        self, steps: int = -1, timeout: float | None = None,
        timeout_fn: Callable[[], bool] | None = None,
    ) -> dict[str, Any]:
        """Restores and evaluates each new checkpoint of the manager's directory.

        Args:
            steps: Steps of an evaluation; -1: all of the data.
            timeout: Seconds to wait for the next checkpoint; None: for ever.
            timeout_fn: Called after a time-out; true ends the waiting.

        Returns:
            The last results, as `evaluate` does.

        Raises:
            CheckpointError: No checkpoint appeared.
        """
        directory, output = self._need("checkpoint_manager").directory, None
        for path in tf.train.checkpoints_iterator(directory, 0, timeout, timeout_fn):
            self.restore_checkpoint(path)
            output = self.evaluate(steps)
            self._watchdog.enter(None)  # the next one may be long in coming
            if self._interrupt.requested:
                break
        if output is None and not self._interrupt.requested:
            cause = f"No checkpoint appeared in `{directory}` in {timeout} seconds."
            raise CheckpointError(cause, "Look whether training writes there, or wait.")
        return output or {}

    def restore_checkpoint(self, path: str | None = None) -> str | None:
        """Restores a checkpoint; training goes on with the data that follow it.

        Args:
            path: Of a checkpoint; None: the latest.

        Returns:
            The path restored; None when there is no checkpoint yet.

        Raises:
            CheckpointError: The checkpoint does not hold these objects. (For a manager
                of TensorFlow's: its AssertionError.)
        """
        manager = self._need("checkpoint_manager")
        self._watchdog.enter("restoring")
        with (self.strategy or tf.distribute.get_strategy()).scope():
            if not isinstance(manager, tf.train.CheckpointManager):
                path = manager.restore(path)
            elif path := path or manager.latest_checkpoint:
                status = manager.checkpoint.restore(path)
                status.assert_existing_objects_matched()
        if path is not None:
            if self.trainer is not None:
                self.trainer.reset_iterator()
            self._after_restore()
            self._saved_at = int(self.global_step.numpy())
        return path

    def save_checkpoint(self) -> str:
        """Saves a checkpoint, whatever the intervals; returns its path."""
        manager, step = self._need("checkpoint_manager"), int(self.global_step.numpy())
        is_tf = isinstance(manager, tf.train.CheckpointManager)
        self._watchdog.enter("saving")
        path = manager.save(step, **({"check_interval": False} if is_tf else {}))
        self._saved_at, self._saved_time = step, self._clock()
        return path or manager.latest_checkpoint  # TensorFlow's, saved before

    def _run(
        self, steps: int, saves: bool, evaluate: Any = dict, eval_every: Any = None
    ) -> dict[str, Any]:
        """Runs blocks of steps and after each what is due; returns the last results."""
        self._need("trainer")
        step = first = int(self.global_step.numpy())
        output, results = dict[str, Any](), dict[str, Any]()
        evaluated_at, self.stop_training, signals = None, False, [False, False]
        self._steps, self._secs = 0, 0.0  # in blocks since the last log
        self._saved_time = self._clock()

        def look() -> None:  # who wants to stop, here or in another process
            nonlocal signals
            for action in (*self.train_actions, *self.eval_actions):
                self.stop_training |= getattr(action, "stopped", False)
            self.stop_training, *signals = self._agree(
                [self.stop_training, *self._interrupt.flags])

        def goes_on() -> bool:
            look()
            ended = step > first and self.trainer.data_ended
            stops = ended or self.stop_training or any(signals)
            return not stops and (steps < 0 or step < steps)

        def due(interval: int | None) -> bool:
            return bool(interval and step % interval == 0)

        def evaluate_now() -> None:
            nonlocal results, evaluated_at
            self.evaluation_due.assign(int(any(signals)))
            new = {} if any(signals) else evaluate()
            if not self.evaluation_due.numpy():
                results, evaluated_at = new, step

        for reporter in self.reporters:
            reporter.start(step, None if steps < 0 else steps)
        try:
            with self._context:
                if self.evaluation_due.numpy() and goes_on():
                    evaluate_now()
                while goes_on():
                    try:
                        output = self._block(step, steps, eval_every)
                    except EndOfDataError:
                        if step == first:
                            raise
                        break
                    step += self.trainer.steps_done
                    self._background("check")
                    for action in self.train_actions:
                        action(output)
                    more = goes_on()
                    logs = not more or due(self._log_every)
                    self._report(step, output, logs, due(self._summary_every))
                    if due(eval_every):
                        evaluate_now()
                    passed = self._clock() - self._saved_time
                    is_due = due(self._save_every) or passed >= self._save_secs
                    if is_due and (more or not saves):  # else after the evaluation
                        self._save_once(step)
                self._report(step, output, logs=True)
                too_short = step < steps and not self.stop_training
                cut = too_short or any(signals)
                if evaluated_at != step and not cut:
                    evaluate_now()
                if saves or cut:
                    self._save_once(step)
                self._watchdog.enter("saving")
                self._background("wait")
                look()
        finally:
            for reporter in self.reporters:
                reporter.finish(step)
        end_if(signals, step)
        if cut:
            cause = f"The training data ended after step {step} of {steps}."
            raise EndOfDataError(cause, "Repeat them, or train for -1 steps.")
        return results

    def _block(self, step: int, steps: int, eval_every: int | None) -> dict[str, Any]:
        """Runs the steps up to the nearest boundary; returns the output."""
        every = [self._steps_per_loop, self._log_every, self._summary_every]
        every += [n for n in (self._save_every, eval_every) if n]
        length = min([n - step % n for n in every] + [steps - step] * (steps >= 0))
        start = self._clock()
        self._watchdog.enter("training", self.trainer.loop)
        with self._summaries.to("train", self._summary_every):
            output = self.trainer.train(tf.constant(length, tf.int64))
        # Waits for the devices: the time is training's.
        now, done = int(self.global_step.numpy()), self.trainer.steps_done
        self._steps += done
        self._secs += self._clock() - start
        if self.trainer.should_stop():
            if error := self.trainer.nonfinite_error():
                raise error
            self.stop_training = True
        elif now != step + done or not (done or self._interrupt.halted):
            cause = f"`global_step` went from {step} to {now} in {done} steps."
            remedy = "Add 1 to it in each `train_step`, and make at least one step."
            raise ConfigError(cause, remedy)
        return output or {}

    def _report(self, step: int, output: Any, logs: bool, summarises=False) -> None:
        """Logs and summarises the steps since the last log, if there are any."""
        if not (self._steps and (logs or summarises)):
            return
        values = _on_host({**output, **self.trainer.report()})
        speed = self._steps / max(self._secs, 1e-9)
        if summarises:
            self._summaries.write("train", {**values, "steps_per_sec": speed})
        if logs:
            for reporter in self.reporters:
                reporter.train(step, values, speed)
            self.trainer.reset_metrics()
            self._steps, self._secs = 0, 0.0

    def _save_once(self, step: int) -> None:
        if self.checkpoint_manager is not None and self._saved_at != step:
            self.save_checkpoint()

    def _background(self, method: str) -> None:
        getattr(self.checkpoint_manager, method, lambda: None)()

    def _need(self, argument: str) -> Any:
        if getattr(self, argument) is None:
            cause = f"`{argument}` is None, and this method needs it."
            raise ConfigError(cause, f"Give `{argument}` to the Controller.")
        return getattr(self, argument)


def _named(evaluator: Any) -> Mapping[str, Any]:
    return evaluator if isinstance(evaluator, Mapping) else {"validation": evaluator}


def _on_host(values: Mapping[str, Any] | None, prefix: str = "") -> dict[str, Any]:
    """Returns nested dicts of tensors as one of numbers and arrays, named "a/b"."""
    host: dict[str, Any] = {}
    for name, value in (values or {}).items():
        if isinstance(value, Mapping):
            host.update(_on_host(value, f"{prefix}{name}/"))
        else:
            array = np.asarray(value.numpy() if tf.is_tensor(value) else value)
            host[prefix + name] = array if array.ndim else array.item()
    return host
