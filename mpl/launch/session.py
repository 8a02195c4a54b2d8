"""One run of an experiment that is set up: training, evaluation, export, prediction."""

import dataclasses
import os
import sys
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from mpl import loop
from mpl.errors import CheckpointError, Preempted
from mpl.experiment import Experiment
from mpl.launch import jit_trial, predictions, workdir
from mpl.launch.config import TRAINING_MODES, EarlyStop, better
from mpl.launch.config import parse_best_metric, parse_early_stop
from mpl.launch.guide import Guide
from mpl.launch.intervals import intervals
from mpl.launch.option import written
from mpl.loop.inner_loop import counter
from mpl.loop.interrupt import end_if
from mpl.record.checkpoint import Checkpoints
from mpl.record.export import SavedPredictor
from mpl.record.goodput import Goodput
from mpl.record.metrics_log import MetricsWriter
from mpl.record.progress import Progress

Results = dict[str, dict[str, float]]
_POLL_SECS = 10.0  # how often continuous_eval asks whether training is complete
_WATCHED = ("early_stop", "best_metric", "learning_rate")


def metric_names(experiment: Experiment) -> list[str]:
    """Returns the names of an experiment's metrics, the headline first."""
    names = [experiment.headline(), *experiment.metrics(), "loss"]
    return list(dict.fromkeys(names))


def result_line(name: str, values: Mapping[str, float]) -> str:
    """Returns the last line of a binary: `digits: accuracy 0.9861 loss 0.0512`."""
    shown = (f"{value:.4f}" if isinstance(value, float) else value
             for value in values.values())  # fmt: skip
    return " ".join([f"{name}:", *(f"{n} {v}" for n, v in zip(values, shown))])


class Session:
    """One run of an experiment: its folder, its loops, its figures.

    Args:
        experiment: set up.
        path: folder of the run.
        start: command that starts the program, for hints; None: in a notebook.
        record: what the run's flagfile said before; None: a new run.

    Attributes:
        checkpoints, best: those of training, and the one best by validation.
        last: the last values of each split, by name.
    """

    def __init__(
        self,
        experiment: Experiment,
        path: str,
        start: str | None = None,
        record: Mapping[str, str] | None = None,
    ):
        config = self.config = experiment.config
        self.experiment, self.path = experiment, path
        self._guide = Guide(experiment, path, start)
        # Of several processes that train in step the chief alone writes and prints.
        peers = self._peers = experiment.peers
        self._print = print if peers.is_chief else _say_nothing
        headline = experiment.headline()
        watch = EarlyStop(headline, sys.maxsize, better(headline))
        if config.early_stop is not None:
            watch = parse_early_stop(config.early_stop)
        best = watch.metric, watch.mode
        if config.best_metric is not None:
            best = parse_best_metric(config.best_metric)
        self.stopping = loop.EarlyStopping(
            f"validation/{watch.metric}", watch.patience, watch.mode
        )
        self.best_metric = loop.NewBestMetric(f"validation/{best[0]}", best[1])
        self._evaluation_due = counter()
        objects = {"early_stopping": self.stopping, "best_metric": self.best_metric,
                   "evaluation_due": self._evaluation_due,
                   **experiment.checkpoint_objects()}
        # The best value of another metric means nothing; a constant rate is a variable.
        new = {name: written(getattr(config, name)) for name in _WATCHED}
        rates = [rate for each in tf.nest.flatten(experiment.optimizer)
                 if isinstance(rate := each.inner.learning_rate, keras.Variable)]
        watching: Any = (self.stopping.variables, self.best_metric.variables, rates)
        self._anew = [
            (variable, variable.numpy()) for variables, before, after in zip(
                watching, _watched(record or new), _watched(new))
            if before != after for variable in variables]
        self.checkpoints = Checkpoints(
            self._file("checkpoints"), max_to_keep=config.max_to_keep,
            keep_every_steps=config.keep_every_steps, writes=peers.is_chief,
            asynchronous=config.async_checkpoints,
            check_values=experiment.require_finite,
            facts={"flags": dataclasses.asdict(config)}, **objects)
        self.best = self.checkpoints.best(best[0])
        self.last = _Last()
        self._said: dict[str, int] = {}
        size, epoch = config.global_batch_size, experiment.batches_per_epoch
        shown = None if config.train_steps else epoch
        log = self._file("metrics.jsonl")
        self._goodput = Goodput(self._file("goodput.json"))
        self._reporters: list[Any] = [self.last]
        self._log = MetricsWriter(log, global_batch_size=size, batches_per_epoch=epoch,
                                  goodput=self._goodput)
        if peers.is_chief:
            progress = Progress(global_batch_size=size, batches_per_epoch=shown)
            self._reporters += [progress, self._log]
        runners: list[Any] = [experiment.trainer, *experiment.evaluators.values()]
        self._interrupt = loop.Interrupt(  # of processes in step none may end alone
            [each.loop for each in runners] if peers.size == 1 else [],
            ["SIGTERM", config.preemption_signal])
        self._watchdog = loop.Watchdog(config.watchdog_secs)

    def go(self) -> Results:
        """Does what `mode` says, and returns the last values of each split.

        Raises:
            Preempted, KeyboardInterrupt: A signal asked the run to end, which it did
                after the step, the write or the batch of predictions under way.
        """
        try:
            with self._interrupt, self._watchdog:
                return self._go()
        except (KeyboardInterrupt, Preempted) as end:
            how = "Preempted after" if isinstance(end, Preempted) else "Stopped at"
            text = (f"{how} step {self._step()}; last checkpoint: "
                    f"{self.checkpoints.latest}\nGo on with: {self._guide.command()}")
            self._print(text, file=sys.stderr)
            if self._peers.is_chief:
                self._log.note(self._step(), text)
            raise

    def _go(self) -> Results:
        mode = self.config.mode
        if mode in TRAINING_MODES:
            self.train()
        elif mode == "continuous_eval":
            self.follow()
        else:
            self.restore()
        if mode in ("train_and_eval", "all", "continuous_eval"):
            self.evaluate("test")
        elif mode == "eval":
            self.evaluate("validation", "test")
        self._end_if_asked()
        if mode in ("all", "export") and self._peers.is_chief:
            self.export()
        if mode in ("all", "predict") and self._peers.is_chief:
            self.predict()
        self._end_if_asked()
        if mode in TRAINING_MODES:
            self._print(self._guide)
        self._print(result_line(self.experiment.name, self._final()), flush=True)
        return self.last.values

    def train(self) -> None:
        """Trains from the last checkpoint on; with early stopping, ends at the best."""
        total, evaluates = self.experiment.train_steps, self.config.mode != "train"
        controller = self._controller(
            *["validation"] * evaluates,
            eval_actions=[
                loop.Conditional(
                    self.best_metric.commit, lambda _: self.best.save(self._step())),
                self.stopping,
            ],
        )
        restored, config = self._restore(controller), self.config
        if not restored and config.init_from is not None:
            self._print(self.experiment.init_from(config.init_from))
        if config.policy == "auto":
            config = dataclasses.replace(config, policy=self.experiment.policy.name)
        # Not before: a run whose checkpoint does not fit keeps its flags.
        if self._peers.is_chief:
            facts = workdir.facts_of(self.experiment)
            workdir.write_flagfile(self.path, config, facts)
        if self.config.early_stop:
            metric, _, mode = parse_early_stop(self.config.early_stop)
            text = f"Early stopping looks for the {mode}imum of validation {metric}"
            self._print(text)
        if restored:
            self._print(f"Going on at step {self._step()} of {total} in {self.path}")
            for variable, value in self._anew:
                variable.assign(value)
        trainer = self.experiment.trainer
        trainer.jit_trial = jit_trial.trial_of(self.experiment, self.path)
        if evaluates and "validation" in self.experiment.evaluators:
            controller.train_and_evaluate(total)
        else:
            controller.train(total)
        self._guide.stopped_early = self.stopping.stopped
        chief = self._peers.is_chief  # which has written all by now
        if chief:
            self._goodput.finish()
        self._print(self._goodput)
        best = self._peers.of_chief(self.best.latest if chief else None)
        if self.config.early_stop and best:
            self._restore(controller, best)
            self._print(f"Best by validation: step {self._step()}, used from here on")

    def follow(self) -> None:
        """Evaluates each new checkpoint until training is complete."""

        def complete() -> bool:
            asked, total = self._interrupt.requested, self.experiment.train_steps
            return bool(asked) or self._step() >= total or self.stopping.stopped

        controller = self._controller("validation")
        controller.evaluate_continuously(timeout=_POLL_SECS, timeout_fn=complete)

    def restore(self, path: str | None = None) -> None:
        """Restores the best checkpoint of a run with early stopping, else the last.

        Args:
            path: restores this checkpoint instead.

        Raises:
            CheckpointError: there is none yet.
        """
        best = self.best.latest if self.config.early_stop else None
        if self._restore(self._controller(), path or best) is None:
            cause = f"`workdir` ({self.path}) holds no checkpoint yet."
            raise CheckpointError(cause, "Wait for the first one, or train there.")
        self._print(f"Restored step {self._step()} of {self.path}")

    def _restore(self, controller: loop.Controller, path: Any = None) -> str | None:
        """Restores on all processes the checkpoint that the chief can read."""
        is_chief = self._peers.is_chief
        path = controller.restore_checkpoint(path) if is_chief else None
        path = self._peers.of_chief(path)
        if path is not None and not is_chief:
            controller.restore_checkpoint(path)
        return path

    def _end_if_asked(self) -> None:
        """Ends all processes here if one of them was asked to end."""
        self._watchdog.enter(None)  # others may be at work
        end_if(self._peers.any_of(self._interrupt.flags), self._step())

    def evaluate(self, *splits: str) -> None:
        """Evaluates those of the splits that have data."""
        if any(split in self.experiment.evaluators for split in splits):
            self._controller(*splits).evaluate()

    def export(self) -> None:
        """Writes a SavedModel, reloads it, and says how far its predictions are off."""
        self._watchdog.enter("export")
        dtype, path = self.config.export_weights, self.config.output
        path = self.experiment.export(path or self._file("export"), dtype)
        batch = next(predictions.examples(self.experiment)[1])
        pairs = zip(
            tf.nest.flatten(SavedPredictor(path)(batch)),
            tf.nest.flatten(self.experiment.predictor()(batch)),
        )
        largest = max(float(np.max(np.abs(a - b))) for a, b in pairs)
        self._print(
            f"Exported to {path}; {dtype} export against "
            f"{self.experiment.policy.name} training: largest difference {largest:.1e}"
        )
        self._said = {"step": self._step()}

    def predict(self) -> None:
        """Writes predictions for the input, or the test data, as an .npz file."""
        path = self.config.output or self._file("predictions.npz")
        predictor = self.experiment.predictor()
        count = predictions.write(
            self.experiment, path, predictor, goes_on=self._goes_on)
        if count is not None:
            self._print(f"Predictions for {count} examples are in {path}")
            self._said = {"predictions": count}

    def _goes_on(self) -> bool:
        self._watchdog.enter("prediction")
        return self._interrupt.requested is None

    def _controller(self, *splits: str, eval_actions: Any = None) -> loop.Controller:
        experiment, evaluators = self.experiment, self.experiment.evaluators
        writes = self.config.summary_every_steps != 0 and self._peers.is_chief
        summaries = self._file("summaries") if writes else None
        every = intervals(
            self.config, experiment.train_steps, experiment.batches_per_epoch
        )
        return loop.Controller(
            global_step=experiment.global_step,
            trainer=experiment.trainer,
            evaluator={s: evaluators[s] for s in splits if s in evaluators},
            strategy=experiment.strategy,
            eval_actions=eval_actions,
            checkpoint_manager=self.checkpoints,
            checkpoint_every_secs=self.config.checkpoint_every_secs,
            summary_dir=summaries and os.path.join(summaries, "train"),
            eval_summary_dir=summaries,
            reporters=self._reporters,
            after_restore=experiment.after_restore,
            agree=self._peers.any_of if self._peers.size > 1 else None,
            interrupt=self._interrupt,
            watchdog=self._watchdog,
            evaluation_due=self._evaluation_due,
            **every,
        )

    def _step(self) -> int:
        return int(self.experiment.global_step.numpy())

    def _file(self, name: str) -> str:
        return os.path.join(self.path, name)

    def _final(self) -> Mapping[str, float]:
        for split in ("test", "validation", "train"):
            if final := self.last.values.get(split):
                names = metric_names(self.experiment)
                return {name: final[name] for name in names if name in final}
        return self._said


def _watched(settings: Mapping[str, str]) -> tuple[str, str, str]:
    """Returns the metrics of early stopping and the best checkpoint, and the rate."""
    stop, best, rate = (
        settings.get(name, "none").partition(":")[0] for name in _WATCHED)
    return stop, stop if best == "none" else best, rate


def _say_nothing(*args: Any, **kwargs: Any) -> None: ...


class _Last:
    """A reporter that keeps the last scalars of each split."""

    def __init__(self) -> None:
        self.values: Results = {}

    def start(self, step: int, total_steps: int | None) -> None: ...

    def finish(self, step: int) -> None: ...

    def train(self, step: int, values: Mapping[str, Any], steps_per_sec: float) -> None:
        self.evaluation(step, "train", values)

    def evaluation(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        scalars = {n: float(v) for n, v in values.items() if np.ndim(v) == 0}
        scalars.pop("steps_per_sec", None)
        self.values[split] = scalars
