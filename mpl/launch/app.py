"""From an experiment class to a finished run: what ends every binary."""

import contextlib
import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf
from absl import app as absl_app
from absl import flags as absl_flags
from absl import logging

from mpl import data, distribute, errors
from mpl.errors import ConfigError
from mpl.experiment import Experiment
from mpl.launch import flags, identity, predictions, workdir
from mpl.launch.config import TRAINING_MODES, RunConfig, merged
from mpl.launch.details import watching
from mpl.launch.guide import python
from mpl.launch.intervals import intervals
from mpl.launch.session import Results, Session, metric_names, result_line
from mpl.record import SavedPredictor, pretrained

_ERRORS = (
    ConfigError, errors.CheckpointError, errors.ClusterError, errors.NonFiniteError
)  # fmt: skip


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
        Preempted: a signal asked the run to end; all it had done is saved.
    """
    is_script = hasattr(sys.modules["__main__"], "__file__")
    if is_script and experiment_class.__module__ == "__main__":
        return run_program(experiment_class, overrides, sys.argv)
    return execute(experiment_class, {}, overrides)


def run_program(
    experiment_class: type[Experiment], defaults: Mapping[str, Any], argv: Sequence[str]
) -> Results:
    """Runs an experiment as an absl binary with this command line.

    Raises:
        SystemExit: after a help text (0), an error of mpl (1), a wrong flag (2), a
            preemption (42), or Ctrl-C (130). The watchdog ends the process with 43, a
            second signal with 128 + its number.
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
        logging.get_absl_handler().addFilter(_is_ours_or_matters)
        tf.get_logger().setLevel("WARNING")  # a note on every reduction
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


def _is_ours_or_matters(record: Any) -> bool:
    """Leaves out TensorFlow's notes on each checkpoint."""
    of_tensorflow = record.pathname.startswith(os.path.dirname(tf.__file__))
    return record.levelname != "INFO" or not of_tensorflow


def _exit(error: Exception, code: int) -> None:
    print(errors.two_lines(error), file=sys.stderr)
    sys.exit(code)


def program() -> str:
    """Returns the command that started this process, without flags."""
    spec = sys.modules["__main__"].__spec__
    if spec is None:
        return shlex.join([python(), os.path.relpath(sys.argv[0])])
    return shlex.join([python(), "-m", spec.name.removesuffix(".__main__")])


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
    config = merged(experiment_class.Config or RunConfig, defaults, given)
    cluster = distribute.find_cluster()
    if config.device_report:  # of this process
        distribute.configure(config.visible_devices, config.gpu_memory_limit_mb)
        alone = dataclasses.replace(config, strategy="auto") if cluster else config
        _strategy(alone, None)
        return {}
    if config.saved_model is not None:
        return _predict_saved(experiment_class(), config)
    timeout = config.cluster_timeout
    servers = cluster if cluster and cluster.has_servers else None
    if servers and servers.job != "chief":
        distribute.configure(config.visible_devices, config.gpu_memory_limit_mb)
        distribute.serve(servers, timeout)
        return {}
    with (
        distribute.coordinating(servers, timeout),
        distribute.joined(None if servers else cluster, timeout) as peers,
    ):
        experiment = experiment_class()
        experiment.peers = peers
        return _execute(experiment, config, defaults, given, cluster, start)


def _predict_saved(experiment: Experiment, config: RunConfig) -> Results:
    """Predicts with a SavedModel; the experiment, never set up, reads the input."""
    distribute.configure(config.visible_devices, config.gpu_memory_limit_mb)
    experiment.config, path = config, config.output or "predictions.npz"
    predictor = SavedPredictor(config.saved_model or "")
    count = predictions.write(experiment, path, predictor, predictor.specs) or 0
    print(f"Predictions for {count} examples are in {path}")
    print(result_line(experiment.name, {"predictions": count}), flush=True)
    return {}


def load_predictor(
    path: str | os.PathLike[str], experiment_class: type[Experiment] | None = None,
    **settings: Any,
) -> Callable[[Mapping[str, Any]], Any]:
    """Returns a function that predicts with an export or with a run.

    It takes a dict of arrays `[n, ...]` by feature name and returns an array
    `[n, ...]`, or a dict of arrays where the model has several outputs.

    Args:
        path: an export, the folder that --mode=export wrote; or, with
            `experiment_class`, the folder of a run or the path of one of its
            checkpoints.
        experiment_class: class of the run's experiment. It is set up as for training,
            so that its data must be there.
        **settings: values for the run instead of those it began with.

    Raises:
        ConfigError: there is no export or run of this experiment.
        CheckpointError: it cannot be read.
    """
    path = os.fspath(path)
    if experiment_class is None:
        return SavedPredictor(path)
    config_class, experiment = experiment_class.Config or RunConfig, experiment_class()
    folder, _, checkpoint = path.partition("/checkpoints/")
    here = {"mode": "predict", "workdir": folder, "strategy": "one_device",
            "num_devices": None, **settings}  # fmt: skip
    config = merged(config_class, here)
    workdir.find_run(config, experiment.name)
    record = workdir.recorded(config_class, workdir.read_flagfile(folder))
    config = merged(config_class, record, here)
    experiment.setup(config, distribute.get_strategy(config.strategy))
    Session(experiment, folder).restore(path if checkpoint else None)
    return experiment.predictor()


def _execute(
    experiment: Experiment,
    config: RunConfig,
    defaults: Mapping[str, Any],
    given: Mapping[str, Any],
    cluster: distribute.Cluster | None,
    start: str | None,
) -> Results:
    record, facts = None, {}
    path = workdir.find_run(config, experiment.name)
    if path is not None:
        record, facts = workdir.read_flagfile(path), workdir.read_facts(path)
        config = workdir.go_on(type(config), record, defaults, given)
    distribute.configure(config.visible_devices, config.gpu_memory_limit_mb)
    check_before(experiment, config, path, cluster)
    peers = experiment.peers
    if peers.size > 1:
        peers.agree(identity.identity_of(type(experiment), config, record))
    with _eagerly(config.debug_eager):
        strategy = _strategy(config, cluster)
        keras.utils.set_random_seed(config.seed)
        if config.deterministic:
            tf.config.experimental.enable_op_determinism()
        experiment.setup(config, strategy)
        check_after(experiment, config, facts)
        trains = config.mode in TRAINING_MODES and peers.is_chief
        path = path or workdir.create(config.workdir, experiment.name)
        with (
            workdir.lock(path) if trains else contextlib.nullcontext(),
            data.naming_damage(experiment.pipelines.values()),
            watching(experiment, path),
        ):
            return Session(experiment, path, start, record).go()


def _strategy(
    config: RunConfig, cluster: distribute.Cluster | None
) -> tf.distribute.Strategy:
    """Makes the strategy, and says what devices there are."""
    strategy = distribute.get_strategy(
        config.strategy, config.num_devices, cluster=cluster, tpu=config.tpu,
        communication=config.communication, timeout_secs=config.cluster_timeout)
    why = distribute.reason(
        config.strategy, config.num_devices, cluster, config.tpu)
    print(distribute.report(strategy, why), flush=True)
    return strategy


def check_before(
    experiment: Experiment, config: RunConfig, path: str | None,
    cluster: distribute.Cluster | None = None,
) -> None:
    """Checks what needs no model and would fail late.

    Raises:
        ConfigError: the workdir takes no files, `data_dir` is missing, the experiment
            cannot predict and is asked to, a cluster lacks a `workdir`, or the strategy
            does not go with what is there or with other settings.
    """
    name, _ = distribute.choose(
        config.strategy, config.num_devices, cluster=cluster, tpu=config.tpu,
        communication=config.communication)
    if name == "parameter_server":
        distribute.check_server_settings(config)
    if cluster is not None and config.workdir is None:
        raise ConfigError(
            "`workdir` is not set, and all processes of a cluster must know it.",
            "Give all of them the same folder: --workdir=<shared folder>.",
        )
    if cluster is not None and config.mode == "continuous_eval":
        raise ConfigError(
            "`mode` (continuous_eval) is for one process beside the cluster.",
            "Run it without TF_CONFIG, with the cluster's --workdir.",
        )
    if path is None and config.init_from is not None:
        pretrained.checkpoint_at(config.init_from)
    predict = type(experiment).predict
    if config.mode in TRAINING_MODES:
        place = os.path.join(workdir.RUNS, experiment.name)
        workdir.check_writable(path or config.workdir or place)
    if config.data_dir is not None and not tf.io.gfile.isdir(config.data_dir):
        raise ConfigError(
            f"`data_dir` ({config.data_dir}) must be a folder that exists.",
            "Correct --data_dir, or leave it out for the experiment's own data.",
        )
    if predict is Experiment.predict and config.mode in ("all", "predict", "export"):
        raise ConfigError(
            f"`mode` ({config.mode}) needs `{type(experiment).__name__}.predict`.",
            "Define `predict(self, batch)`, or use --mode=train_and_eval.",
        )


def check_after(experiment: Experiment, config: RunConfig, facts: Mapping) -> None:
    """Checks, with the experiment set up, what training would find late.

    Raises:
        ConfigError: intervals or evaluations do not go with the data, or the training
            data are not those of the run that goes on, see `workdir.read_facts`.
    """
    new = workdir.facts_of(experiment)
    changes = [workdir.Change(n, facts.get(n, new[n]), new[n], True) for n in new]
    workdir.accept(config, [change for change in changes if change.old != change.new])
    intervals(config, experiment.train_steps, experiment.batches_per_epoch)
    names = metric_names(experiment) if "validation" in experiment.evaluators else []
    if config.mode in ("eval", "continuous_eval") and not names:
        raise ConfigError(
            f"`mode` ({config.mode}) needs validation data, and there are none.",
            "Return examples for the split 'validation' in `build_data`.",
        )
    for name in ("early_stop", "best_metric"):
        text = getattr(config, name)
        if text is not None and text.partition(":")[0] not in names:
            raise ConfigError(
                f"`{name}` ({text}) must name a metric of the validation data: "
                f"{', '.join(names) or 'there are none'}.",
                f"Correct the name, or use --{name}=none.",
            )


@contextlib.contextmanager
def _eagerly(eagerly: bool) -> Iterator[None]:
    former = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(eagerly or former)
    try:
        yield
    finally:  # a notebook's next run must not inherit it
        tf.config.run_functions_eagerly(former)
