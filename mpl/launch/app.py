"""From an experiment class to a finished run: what ends every binary."""

import contextlib
import dataclasses
import importlib.util
import io
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import app as absl_app
from absl import flags as absl_flags

from mpl import distribute, loop
from mpl.errors import (
    CheckpointError,
    ClusterError,
    ConfigError,
    NonFiniteError,
    two_lines,
)
from mpl.experiment import Experiment
from mpl.launch import flags, workdir
from mpl.launch.config import (
    TRAINING_MODES,
    EarlyStop,
    RunConfig,
    better,
    merged,
    parse_early_stop,
)
from mpl.launch.option import written
from mpl.record.checkpoint import Checkpoints
from mpl.record.export import load_predictor
from mpl.record.metrics_log import MetricsWriter
from mpl.record.progress import Progress

Results = dict[str, dict[str, float]]
_ERRORS = (ConfigError, CheckpointError, ClusterError, NonFiniteError)
_PREDICTING_MODES = ("all", "predict", "export")
_MOST_STEPS_WITHOUT_CHECKPOINT = 1000
_POLL_SECS = 10.0  # continuous_eval asks this often whether training is complete


def run(experiment_class: type[Experiment], **overrides: Any) -> Results:
    """Runs an experiment as its settings say: what ends every binary.

    When the class is defined in the script that runs, the command line is read:
    `overrides` are then defaults of its flags, a wrong flag ends the process with code
    2, an error of mpl with code 1 and two lines. Anywhere else, as in a notebook,
    `overrides` are the settings and errors are raised.

    Args:
        experiment_class: a subclass of `Experiment`.
        **overrides: values of fields of its `Config`.

    Returns:
        The last metrics of each split, by name.

    Raises:
        ConfigError: a setting is unknown or wrong; nothing was written.
        CheckpointError: the run's checkpoint does not fit the experiment.
        NonFiniteError: too many steps in a row were skipped.
    """
    if is_program(experiment_class):
        return as_program(experiment_class, overrides, sys.argv)
    return execute(experiment_class, {}, overrides)


def is_program(experiment_class: type[Experiment]) -> bool:
    """Says whether the class is defined in the script that this process runs."""
    main = sys.modules["__main__"]
    return experiment_class.__module__ == "__main__" and hasattr(main, "__file__")


def as_program(
    experiment_class: type[Experiment], defaults: Mapping[str, Any], argv: Sequence[str]
) -> Results:
    """Runs an experiment as an absl binary with this command line.

    Raises:
        SystemExit: after a help text (0), an error of mpl (1), a wrong flag (2), or
            Ctrl-C (130).
    """
    config_class, start = experiment_class.Config or RunConfig, program()
    results: list[Results] = []

    def read(argv: Sequence[str]) -> dict[str, Any]:
        text = sys.modules["__main__"].__doc__ or experiment_class.__doc__ or ""
        try:
            given = flags.parse(
                config_class, argv, defaults=defaults, program=start, description=text
            )
            merged(config_class, defaults, given)
        except ConfigError as error:
            _exit(error, 2)
        absl_flags.FLAGS.mark_as_parsed()
        return given

    def main(given: dict[str, Any]) -> None:
        try:
            results.append(execute(experiment_class, defaults, given, start))
        except _ERRORS as error:
            _exit(error, 1)
        except KeyboardInterrupt:
            sys.exit(130)

    try:
        absl_app.run(main, list(argv), flags_parser=read)
    except SystemExit as end:
        if end.code or not results:
            raise
    return results[0]


def _exit(error: Exception, code: int) -> None:
    print(two_lines(error), file=sys.stderr)
    sys.exit(code)


def program() -> str:
    """Returns the command that started this process, without flags."""
    spec = sys.modules["__main__"].__spec__
    if spec is None:
        return shlex.join([_python(), os.path.relpath(sys.argv[0])])
    return shlex.join([_python(), "-m", spec.name.removesuffix(".__main__")])


def _python() -> str:
    path = os.path.relpath(sys.executable)  # not resolved: a link in .venv
    return sys.executable if path.startswith("..") else path


def execute(
    experiment_class: type[Experiment],
    defaults: Mapping[str, Any],
    given: Mapping[str, Any],
    start: str | None = None,
) -> Results:
    """Runs an experiment with these settings, and raises what goes wrong.

    Args:
        experiment_class: a subclass of `Experiment`.
        defaults: values that the program sets; a run that goes on keeps its own.
        given: values that the user gives; they win.
        start: command that starts the program, for hints; None: in a notebook.
    """
    experiment, config_class = experiment_class(), experiment_class.Config or RunConfig
    config, record = merged(config_class, defaults, given), None
    path = workdir.find_run(config, experiment.name)
    if path is not None:
        record = workdir.read_flagfile(path)
        config, changes = workdir.go_on(config_class, record, defaults, given)
        for change in changes:
            print(f"Changed since the run began: {change}")
    check_before(experiment, config, path)
    with _eagerly(config.debug_eager):
        strategy = distribute.get_strategy(config.strategy, config.num_devices)
        keras.utils.set_random_seed(config.seed)
        if config.deterministic:
            tf.config.experimental.enable_op_determinism()
        experiment.setup(config, strategy)
        check_evaluations(experiment, config)
        if config.mode in TRAINING_MODES:
            path = path or workdir.create(config.workdir, experiment.name)
            policy = experiment.policy.name if config.policy == "auto" else config.policy
            workdir.write_flagfile(path, dataclasses.replace(config, policy=policy))
        assert path is not None
        session = Session(experiment, path, start, record)
        return session.go()


def check_before(experiment: Experiment, config: RunConfig, path: str | None) -> None:
    """Checks, before anything is built, what would fail late.

    Raises:
        ConfigError: the workdir takes no files, `data_dir` is missing, or the
            experiment cannot predict and is asked to.
    """
    if config.mode in TRAINING_MODES:
        place = os.path.join(workdir.RUNS, experiment.name)
        workdir.check_writable(path or config.workdir or place)
    if config.data_dir is not None and not tf.io.gfile.isdir(config.data_dir):
        raise ConfigError(
            f"`data_dir` ({config.data_dir}) must be a folder that exists.",
            "Correct --data_dir, or leave it out for the experiment's own data.",
        )
    if config.mode in _PREDICTING_MODES and type(experiment).predict is Experiment.predict:
        raise ConfigError(
            f"`mode` ({config.mode}) needs `{type(experiment).__name__}.predict`.",
            "Define `predict(self, batch)`, or use --mode=train_and_eval.",
        )


def check_evaluations(experiment: Experiment, config: RunConfig) -> None:
    """Checks that there are the data and the metric that an evaluation needs.

    Raises:
        ConfigError: there are no validation data, or no such metric.
    """
    splits, stop = list(experiment.evaluators), config.early_stop
    if config.mode in ("eval", "continuous_eval") and "validation" not in splits:
        raise ConfigError(
            f"`mode` ({config.mode}) needs validation data, and "
            f"{type(experiment).__name__}.build_data gives none.",
            "Return examples for the split 'validation'.",
        )
    names = metric_names(experiment) if "validation" in splits else []
    if stop is not None and parse_early_stop(stop).metric not in names:
        raise ConfigError(
            f"`early_stop` ({stop}) must name a metric of the validation data: "
            f"{', '.join(names) or 'there are none'}.",
            "Correct the name, or use --early_stop=none.",
        )


def metric_names(experiment: Experiment) -> list[str]:
    """Returns the names of an experiment's metrics, the headline first."""
    names = [experiment.headline(), *experiment.metrics(), "loss"]
    return list(dict.fromkeys(names))


@contextlib.contextmanager
def _eagerly(eagerly: bool) -> Iterator[None]:
    former = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(eagerly or former)
    try:
        yield
    finally:  # a notebook's next run must not inherit it
        tf.config.run_functions_eagerly(former)


@dataclasses.dataclass(frozen=True)
class Intervals:
    """Steps between things; `summary` 0: never.

    Attributes:
        evaluate: between evaluations.
        checkpoint: between checkpoints.
        log: between reports of training.
        summary: between TensorBoard points.
        steps_per_loop: at most, in one call of the compiled loop.
    """

    evaluate: int
    checkpoint: int
    log: int
    summary: int
    steps_per_loop: int


def intervals(
    config: RunConfig, train_steps: int, batches_per_epoch: int | None
) -> Intervals:
    """Returns all intervals: those set, and the rules for the others.

    Raises:
        ConfigError: epochs are asked for, and nobody knows how long one is.
    """
    if config.eval_every_epochs and batches_per_epoch is None:
        raise ConfigError(
            f"`eval_every_epochs` ({config.eval_every_epochs}) needs training data of "
            "known length.",
            "Use --eval_every_steps, or give the DatasetSource `num_examples`.",
        )
    by_epochs = config.train_steps is None and batches_per_epoch is not None
    epoch = batches_per_epoch or 0
    evaluate = config.eval_every_steps or (config.eval_every_epochs or 0) * epoch
    evaluate = evaluate or (epoch if by_epochs else train_steps)
    checkpoint = min(evaluate, _MOST_STEPS_WITHOUT_CHECKPOINT)
    checkpoint = config.checkpoint_every_steps or checkpoint
    log = config.log_every_steps or min(evaluate, epoch if by_epochs else 100)
    summary = config.summary_every_steps
    summary = log if summary is None else summary
    shortest = min(100, evaluate, checkpoint, log, summary or log)
    steps_per_loop = config.steps_per_loop or shortest
    return Intervals(evaluate, checkpoint, log, summary, steps_per_loop)


class Session:
    """One run of an experiment that is set up: its folder, its loops, its figures.

    Args:
        experiment: set up.
        path: folder of the run.
        start: command that starts the program, for hints; None: in a notebook.
        record: what the run's flagfile said before; None: a new run.

    Attributes:
        last: the last values of each split, by name.
        said: figures of the last line where nothing was evaluated.
    """

    def __init__(
        self,
        experiment: Experiment,
        path: str,
        start: str | None = None,
        record: Mapping[str, str] | None = None,
    ):
        config = experiment.config
        self.experiment, self.config = experiment, config
        self.path, self._start = path, start
        self.last = _Last()
        self.said: dict[str, int] = {}
        watch = _watched(config.early_stop, experiment)
        stop = (record or {}).get("early_stop", "none")
        before = _watched(None if stop == "none" else stop, experiment)
        self._watches_anew = (watch.metric, watch.mode) != (before.metric, before.mode)
        self.stopping = loop.EarlyStopping(
            f"validation/{watch.metric}", watch.patience, watch.mode
        )
        self.checkpoints = Checkpoints(
            self._file("checkpoints"),
            **experiment.checkpoint_objects(),
            early_stopping=self.stopping,
        )
        self.best = self.checkpoints.best(watch.metric)
        epoch = experiment.batches_per_epoch
        self._every = intervals(config, experiment.train_steps, epoch)
        sizes = {
            "global_batch_size": config.global_batch_size, "batches_per_epoch": epoch
        }  # fmt: skip
        self._reporters = (
            Progress(**sizes | ({"batches_per_epoch": None} * bool(config.train_steps))),
            MetricsWriter(self._file("metrics.jsonl"), **sizes),
            self.last,
        )

    def go(self) -> Results:
        """Does what `mode` says, and returns the last values of each split."""
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
        if mode in ("all", "export"):
            self.export()
        if mode in ("all", "predict"):
            self.predict()
        if mode in TRAINING_MODES:
            print(self.guide())
        print(result_line(self.experiment.name, self._final()), flush=True)
        return self.last.values

    def train(self) -> None:
        """Trains from the last checkpoint on; with early stopping, ends at the best."""
        total, every = self.experiment.train_steps, self._every
        evaluates = self.config.mode != "train"
        controller = self._controller(
            *["validation"] * evaluates,
            eval_actions=[
                loop.Conditional(self.stopping.best.test, self._save_best),
                self.stopping,
            ],
            steps_per_loop=every.steps_per_loop,
            log_every_steps=every.log,
            eval_every_steps=every.evaluate,
            checkpoint_every_steps=every.checkpoint,
            summary_interval=every.summary or None,
        )
        new = [variable.numpy() for variable in self.stopping.variables]
        if controller.restore_checkpoint():
            print(f"Going on at step {self._step()} of {total} in {self.path}")
            if self._watches_anew:  # a best value of another metric says nothing
                for variable, value in zip(self.stopping.variables, new):
                    variable.assign(value)
        try:
            if evaluates and "validation" in self.experiment.evaluators:
                controller.train_and_evaluate(total)
            else:
                controller.train(total)
        except KeyboardInterrupt:
            saved = self.checkpoints.latest or "none yet"
            print(
                f"Stopped at step {self._step()}; the last checkpoint: {saved}\n"
                f"Go on with: {self.command()}",
                file=sys.stderr,
            )
            raise
        if self.config.early_stop and self.best.latest:
            controller.restore_checkpoint(self.best.latest)
            print(f"The best checkpoint is that of step {self._step()}")

    def follow(self) -> None:
        """Evaluates each new checkpoint until training is complete."""

        def complete() -> bool:
            return self._step() >= self.experiment.train_steps or self.stopping.stopped

        self._controller("validation").evaluate_continuously(
            timeout=_POLL_SECS, timeout_fn=complete
        )

    def restore(self) -> None:
        """Restores the best checkpoint of a run with early stopping, else the last.

        Raises:
            CheckpointError: there is none yet.
        """
        best = self.best.latest if self.config.early_stop else None
        if self._controller().restore_checkpoint(best) is None:
            raise CheckpointError(
                f"`workdir` ({self.path}) holds no checkpoint yet.",
                "Wait for the first one, or train there.",
            )
        print(f"Restored step {self._step()} of {self.path}")

    def evaluate(self, *splits: str) -> None:
        """Evaluates those of the splits that have data."""
        if any(split in self.experiment.evaluators for split in splits):
            self._controller(*splits).evaluate()

    def export(self) -> None:
        """Writes a SavedModel, reloads it, and says how far its predictions are off."""
        path = self.experiment.export(self.config.output or self._file("export"))
        batch = next(self._batches())
        reloaded, here = load_predictor(path)(batch), self.experiment.predictor()(batch)
        pairs = zip(tf.nest.flatten(reloaded), tf.nest.flatten(here))
        largest = max(float(np.max(np.abs(a - b))) for a, b in pairs)
        print(f"Exported to {path}; reloaded, its predictions differ by {largest:.1e}")
        self.said = {"step": self._step()}

    def predict(self) -> None:
        """Writes predictions for the input file, or the test data, as an .npz file."""
        predictions = _predict(self.experiment.predictor(), self._batches())
        arrays = predictions if isinstance(predictions, dict) else {
            "predictions": predictions
        }  # fmt: skip
        path = self.config.output or self._file("predictions.npz")
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        with tf.io.gfile.GFile(path, "wb") as file:
            file.write(buffer.getvalue())
        count = len(next(iter(arrays.values())))
        print(f"Predictions for {count} examples are in {path}")
        self.said = {"predictions": count}

    def command(self, **settings: Any) -> str:
        """Returns what to type for this run's folder with these settings."""
        settings = {"workdir": self.path, **settings}
        if self._start is None:
            shown = ", ".join(f"{name}={value!r}" for name, value in settings.items())
            return f"mpl.run({type(self.experiment).__name__}, {shown})"
        shown = [f"--{name}={written(value)}" for name, value in settings.items()]
        return f"{self._start} {shlex.join(shown)}"

    def guide(self) -> str:
        """Says where the files lie, and how to go on."""
        epochs = (self.config.train_epochs or 1) * 2
        longer = {"train_epochs": epochs}
        if self.config.train_steps:
            longer = {"train_steps": self.config.train_steps * 2}
        if self.config.lr_schedule != "constant":
            longer["allow_changed_flags"] = True
        names = ("flagfile.txt", "metrics.jsonl", "checkpoints", "summaries", "export",
                 "predictions.npz")  # fmt: skip
        there = [name for name in names if tf.io.gfile.exists(self._file(name))]
        board = shlex.join([_python(), "-m", "tensorboard.main", "--logdir",
                            self._file("summaries")])  # fmt: skip
        if importlib.util.find_spec("tensorboard") is None:
            board = f"{_python()} -m pip install tensorboard, before training"
        return "\n".join([
            f"Files:    {', '.join(there)} in {self.path}",
            f"Resume:   {self.command(**longer)}",
            f"Curves:   {board}",
            f"Evaluate: {self.command(mode='eval')}",
            f"Predict:  {self.command(mode='predict')}",
        ])

    def _controller(self, *splits: str, **kwargs: Any) -> loop.Controller:
        evaluators = self.experiment.evaluators
        summaries = self._file("summaries") if self._every.summary else None
        return loop.Controller(
            global_step=self.experiment.global_step,
            trainer=self.experiment.trainer,
            evaluator={s: evaluators[s] for s in splits if s in evaluators},
            strategy=self.experiment.strategy,
            checkpoint_manager=self.checkpoints,
            summary_dir=summaries and os.path.join(summaries, "train"),
            eval_summary_dir=summaries,
            reporters=self._reporters,
            after_restore=self.experiment.after_restore,
            **kwargs,
        )

    def _save_best(self, output: Any) -> None:
        self.best.save(self._step())

    def _step(self) -> int:
        return int(self.experiment.global_step.numpy())

    def _file(self, name: str) -> str:
        return os.path.join(self.path, name)

    def _final(self) -> Mapping[str, float]:
        values = self.last.values
        splits = [split for split in ("test", "validation", "train") if split in values]
        final = values[splits[0]] if splits else self.said
        names = [name for name in metric_names(self.experiment) if name in final]
        return {name: final[name] for name in names} or final

    def _batches(self) -> Iterator[dict[str, np.ndarray]]:
        """Yields the examples to predict: those of `input`, else of the test data."""
        if self.config.input is not None:
            yield _read_arrays(self.config.input)
            return
        pipelines = self.experiment.pipelines
        split = next(s for s in ("test", "validation", "train") if s in pipelines)
        left = pipelines[split].num_examples
        for batch in pipelines[split].dataset().as_numpy_iterator():
            if left is None:  # what fills up the last batch has weight 0
                real = int(np.flatnonzero(batch["weight"])[-1]) + 1
            else:
                real = min(left, len(batch["weight"]))
                left -= real
            if real:
                yield {name: array[:real] for name, array in batch.items()}
            if left == 0:
                return


class _Last(loop.Reporter):
    """Keeps the last scalars of each split."""

    def __init__(self) -> None:
        self.values: Results = {}

    def train(self, step: int, values: Mapping[str, Any], steps_per_sec: float) -> None:
        self.evaluation(step, "train", values)

    def evaluation(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        self.values[split] = {
            name: float(value)
            for name, value in values.items()
            if np.ndim(value) == 0 and name != "steps_per_sec"
        }


def result_line(name: str, values: Mapping[str, float]) -> str:
    """Returns the last line of a binary: `digits: accuracy 0.9861 loss 0.0512`."""
    shown = [f"{n} {v:.4f}" if isinstance(v, float) else f"{n} {v}"
             for n, v in values.items()]  # fmt: skip
    return " ".join([f"{name}:", *shown])


def _watched(early_stop: str | None, experiment: Experiment) -> EarlyStop:
    """Returns what makes a checkpoint the best one, and when training stops early."""
    if early_stop is not None:
        return parse_early_stop(early_stop)
    return EarlyStop(experiment.headline(), sys.maxsize, better(experiment.headline()))


def _predict(predictor: Callable, batches: Iterable[dict[str, np.ndarray]]) -> Any:
    parts = [predictor(batch) for batch in batches]
    return tf.nest.map_structure(lambda *arrays: np.concatenate(arrays), *parts)


def _read_arrays(path: str) -> dict[str, np.ndarray]:
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            content = io.BytesIO(file.read())
        with np.load(content, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, TypeError, tf.errors.OpError) as error:
        raise ConfigError(
            f"`input` ({path}) must be an .npz file of arrays: "
            f"{str(error).splitlines()[0]}",
            "Write one with numpy.savez(path, name=array).",
        ) from error
