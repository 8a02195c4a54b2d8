"""The outer loop: what happens between blocks of steps, and when."""

import contextlib
import importlib.util
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from mpl.errors import CheckpointError, ConfigError
from mpl.loop.actions import Action
from mpl.loop.evaluator import Evaluator
from mpl.loop.inner_loop import EndOfDataError
from mpl.loop.trainer import Trainer

_AT_BOUNDARIES = ("log", "summary", "evaluation", "checkpoint")


class Reporter:
    """Hears what a `Controller` does. Override what you want to hear."""

    def start(self, step: int, total_steps: int | None) -> None:
        """Training starts at `step`, up to `total_steps`; None: to the data's end."""

    def train(self, step: int, values: Mapping[str, Any], steps_per_sec: float) -> None:
        """Values of the steps since the last call, at each multiple of the log interval.

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
        and at the end each of these that was not just done

    Multiples are of `global_step`, so a resumed run keeps the cadence. Nothing is
    restored by the constructor: call `restore_checkpoint`.

    The first Ctrl-C (in the main thread) lets the block end, saves a checkpoint and
    raises `KeyboardInterrupt`; the second raises it at once.

    Args:
        global_step: int64 variable; `train_step` adds 1 to it, the controller reads it.
        trainer: Runs the blocks.
        evaluator: One, or several by the name of their evaluation set.
        strategy: In whose scope checkpoints are restored.
        train_actions: Called with the output of each block.
        eval_actions: Called with the output of each evaluation, as `evaluate` returns
            it. An action of either kind whose `stopped` is true ends training.
        steps_per_loop: No block crosses its multiples: the most steps between two looks
            at the host. A function of the step gives the greatest length of a block.
        log_every_steps: None: after every block.
        eval_every_steps: None: `train_and_evaluate` evaluates at the end only.
        checkpoint_manager: A `tf.train.CheckpointManager`, or another object with
            `directory`, `save(step)` and `restore(path or None)`.
        checkpoint_every_steps: None: the manager's `checkpoint_interval` if it has one,
            else at the end only.
        summary_interval: None: where values are logged. `tf.summary` calls in
            `train_step` write at its multiples only.
        summary_dir: Where summaries of training are written, for TensorBoard.
        eval_summary_dir: Where those of evaluation are; None: `summary_dir`. With
            evaluators by name, each has a folder there.
        reporters: Hear of values and results; none: they are logged.
        after_restore: Called when a checkpoint was restored.
        clock: Gives seconds.

    Attributes:
        stop_training: Set it to True to end training after the block.
    """

    def __init__(
        self,
        *,
        global_step: tf.Variable,
        trainer: Trainer | None = None,
        evaluator: Evaluator | Mapping[str, Evaluator] | None = None,
        strategy: tf.distribute.Strategy | None = None,
        train_actions: Sequence[Action] | None = None,
        eval_actions: Sequence[Action] | None = None,
        steps_per_loop: int | Callable[[int], int] = 100,
        log_every_steps: int | None = None,
        eval_every_steps: int | None = None,
        checkpoint_manager: Any = None,
        checkpoint_every_steps: int | None = None,
        summary_interval: int | None = None,
        summary_dir: str | None = None,
        eval_summary_dir: str | None = None,
        reporters: Sequence[Reporter] | None = None,
        after_restore: Callable[[], Any] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        if trainer is None and evaluator is None:
            raise ConfigError(
                "`trainer` and `evaluator` are both None.", "Give one of them, or both."
            )
        if checkpoint_every_steps is None:
            checkpoint_every_steps = getattr(
                checkpoint_manager, "checkpoint_interval", None
            )
        self._intervals = {
            "steps_per_loop": steps_per_loop,
            "log_every_steps": log_every_steps,
            "summary_interval": summary_interval,
            "eval_every_steps": eval_every_steps,
            "checkpoint_every_steps": checkpoint_every_steps,
        }
