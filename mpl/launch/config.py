"""The settings of a run: one frozen dataclass, one field per flag."""

import dataclasses
import functools
import typing
from collections.abc import Mapping
from typing import Any

from mpl.distribute.strategy import NAMES as STRATEGIES
from mpl.errors import ConfigError
from mpl.launch.option import checked, is_option, option, suggestion
from mpl.precision.policy import get_policy

# Two ways to say the same thing: at most one of each pair may be set.
EXCLUSIVE = (
    ("train_steps", "train_epochs"), ("eval_every_steps", "eval_every_epochs")
)  # fmt: skip
TRAINING_MODES = ("train", "train_and_eval", "all")
MODES = TRAINING_MODES + ("eval", "continuous_eval", "predict", "export")
LOWER_IS_BETTER = (
    "loss", "error", "entropy", "divergence", "perplexity", "hinge", "mse", "mae"
)  # fmt: skip

# What a resumed run may change freely.
_setting = functools.partial(option, math=False)


# fmt: off
@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of a run, checked when made; every field is a flag of the same name.

    An experiment adds flags and its own defaults by a subclass:

        @dataclasses.dataclass(frozen=True)
        class Config(mpl.RunConfig):
            train_epochs = 20
            hidden: int = mpl.option(64, "Units of the hidden layer.", minimum=1)

    Attributes:
        mode: what to do.
        workdir: folder of the run.
        resume: go on in the run that the link `latest` points to.
        data_dir: folder of the data, for experiments that read files.
        max_bad_records: damaged records of files that are left out.
        policy: dtypes of weights, computation and outputs.
        loss_scale: factor of the loss that keeps 16-bit gradients from underflow.
        strategy: how the work is spread over devices.
        num_devices: number of devices used.
        visible_devices: which GPUs, by number.
        gpu_memory_limit_mb: most memory to take of each GPU.
        device_report: print what devices were found, and end.
        tpu: name or address of a TPU.
        cluster_timeout: seconds to wait for all processes of a cluster.
        communication: how gradients travel between devices.
        reduce_dtype: dtype in which gradients are summed over replicas.
        bucket_mb: largest bucket of packed variables, reduced as one.
        global_batch_size: examples in a step, over all devices and micro-batches.
        train_steps: length of the training, in steps.
        train_epochs: length of the training, in passes over the training data.
        steps_per_loop: most steps between two returns to Python.
        eval_every_steps: steps between evaluations.
        eval_every_epochs: epochs between evaluations.
        checkpoint_every_steps: steps between checkpoints.
        checkpoint_every_secs: seconds between checkpoints.
        max_to_keep: checkpoints kept.
        keep_every_steps: steps between checkpoints that are kept for good.
        async_checkpoints: write checkpoints while training goes on.
        best_metric: METRIC, and :min or :max where the name does not tell.
        init_from: checkpoint from which a new run takes its weights.
        log_every_steps: steps between lines of training metrics.
        summary_every_steps: steps between TensorBoard points.
        histogram_every_steps: steps between histograms in TensorBoard.
        profile_steps: FIRST,LAST: the steps to profile.
        seed: of weights, dropout and data order.
        deterministic: equal bits in every repetition, at some cost in speed.
        optimizer: name of a Keras optimizer.
        learning_rate: its highest value over the schedule.
        lr_schedule: course of the learning rate after the warm-up.
        warmup_steps: steps over which the learning rate rises from 0.
        weight_decay: decoupled weight decay.
        clip_norm: bound of the gradient's global norm.
        accumulate_steps: micro-batches in a step.
        ema_decay: decay of the moving average of the weights.
        early_stop: METRIC:PATIENCE, and :min or :max where the name does not tell.
        jit_compile: compile the step with XLA; auto: see `mpl/launch/jit_trial.py`.
        debug_eager: run step by step in Python.
        allow_changed_flags: resume although flags that change the mathematics differ.
        on_nonfinite: what follows a step with infinite or undefined gradients.
        max_consecutive_skips: non-finite steps in a row that end the run.
        preemption_signal: signal that, beside SIGTERM, asks the run to end.
        watchdog_secs: seconds without a step after which a run that hangs is ended.
        export_weights: dtype in which an export stores the weights.
        saved_model: an export to predict with.
        input: file of examples to predict.
        output: file for predictions, or folder for an export.
    """

    mode: str = _setting(
        "train_and_eval", "What to do; all: train, evaluate, export, reload, predict.",
        choices=MODES)
    workdir: str | None = _setting(
        None, "Folder of the run; one that holds a run goes on where it stopped. none: "
        "a new runs/<experiment>/<time>; with --resume and in the modes that do not "
        "train, runs/<experiment>/latest.")
    resume: bool = _setting(
        False, "Go on with the run in --workdir or the latest; an error without one.")
    data_dir: str | None = _setting(
        None, "Folder of the data. none: the experiment's own.")
    max_bad_records: int = _setting(
        0, "Damaged records of the files of a split that are left out, each with a "
        "warning; one more is an error.", minimum=0)
    policy: str = option(
        "auto", "float32, float64, mixed_float16, mixed_bfloat16, bfloat16, native, "
        "params=...,compute=...,output=..., or auto: by device, the log says why.")
    loss_scale: str | float = option(
        "auto", "Loss scale; auto: dynamic for float16, else none.",
        choices=("auto", "none", "dynamic"), above=0)
    strategy: str = _setting(
        "auto", "How to use the devices. auto: a TPU if --tpu names one; what the "
        "cluster is made for, if TF_CONFIG, Slurm or Kubernetes describe one; all GPUs "
        "of the machine; else one device.", choices=STRATEGIES)
    num_devices: int | None = _setting(
        None, "Number of devices, of each process. none: what --strategy says.",
        minimum=1)
    visible_devices: str | None = _setting(
        None, "GPUs to use, by number, as 0,2; cpu: none of them. none: all.")
    gpu_memory_limit_mb: int | None = _setting(
        None, "Most memory to take of each GPU, in MB. none: as needed.", minimum=1)
    device_report: bool = _setting(
        False, "Print what devices were found, what was chosen and why, and end.")
    tpu: str | None = _setting(
        None, "Name or address of a TPU; local: the one of this machine. none: no TPU.")
    cluster_timeout: int = _setting(
        300, "Seconds to wait until all processes of a cluster, or a TPU, are there.",
        minimum=1)
    communication: str = _setting(
        "auto", "How gradients are summed over devices; auto: nccl between GPUs.",
        choices=("auto", "nccl", "ring"))
    reduce_dtype: str = option(
        "float32", "Dtype in which gradients are summed over devices; compute: that of "
        "the computation, half as much to send in 16 bits.",
        choices=("float32", "compute"))
    bucket_mb: int = _setting(
        32, "Largest bucket of packed variables, in MB: gradients of a bucket are "
        "summed over devices as one.", minimum=1)
    global_batch_size: int = option(
        64, "Examples in a step, over all devices and micro-batches.", minimum=1)
    train_steps: int | None = option(
        None, "Length of training in steps; none: by --train_epochs.", minimum=1)
    train_epochs: int | None = option(
        None, "Length of training in passes over its data; none: 1.", minimum=1)
    steps_per_loop: int | None = _setting(
        None, "Most steps in one call of the compiled loop. none: 100, or the shortest "
        "interval if that is less.", minimum=1)
    eval_every_steps: int | None = _setting(
        None, "Steps between evaluations. none: an epoch; with --train_steps, once at "
        "the end.", minimum=1)
    eval_every_epochs: int | None = _setting(
        None, "Epochs between evaluations; this or --eval_every_steps.", minimum=1)
    checkpoint_every_steps: int | None = _setting(
        None, "Steps between checkpoints. none: as evaluations, or 1000.", minimum=1)
    checkpoint_every_secs: float | None = _setting(
        None, "Also a checkpoint after so many seconds without one.", above=0)
    max_to_keep: int = _setting(
        5, "Checkpoints kept, beside the best one.", minimum=1)
    keep_every_steps: int | None = _setting(
        None, "Checkpoints at multiples of so many steps are never deleted.", minimum=1)
    async_checkpoints: bool = _setting(
        True, "Write checkpoints in the background while training goes on.")
    best_metric: str | None = _setting(
        None, "METRIC: keep the one checkpoint with the best validation METRIC, too. "
        "Losses and errors are better when lower, others when higher; METRIC:min or "
        ":max says so. none: that of --early_stop, or the experiment's first.")
    init_from: str | None = _setting(
        None, "Checkpoint, or folder of a run, from which a new run takes the weights "
        "that fit its model; a report says which.")
    log_every_steps: int | None = _setting(
        None, "Steps between lines of training metrics. none: an epoch; with "
        "--train_steps, 100; at most those between evaluations.", minimum=1)
    summary_every_steps: int | None = _setting(
        None, "Steps between TensorBoard points; 0: no points. none: as the log.",
        minimum=0)
    histogram_every_steps: int | None = _setting(
        None, "Steps between histograms of weights and gradients in TensorBoard; "
        "gradients take as much memory again as weights. none: no histograms.",
        minimum=1)
    profile_steps: str | None = _setting(
        None, "FIRST,LAST: write a TensorFlow profile of these steps, counted from 1, "
        "into the workdir. none: no profile.")
    seed: int = option(
        0, "Seed of weights, dropout and data order.", minimum=0, maximum=2**31 - 1)
    deterministic: bool = _setting(
        False, "Use deterministic operations only, for the rest of the process.")
    optimizer: str = option("adam", "Name of a Keras optimizer: sgd, adamw ...")
    learning_rate: float = option(1e-3, "Learning rate at its highest.", minimum=0)
    lr_schedule: str = option(
        "constant", "Course of the learning rate after the warm-up.",
        choices=("constant", "cosine", "linear", "step"))
    warmup_steps: int = option(
        0, "Steps over which the learning rate rises from 0.", minimum=0)
    weight_decay: float | None = option(
        None, "Decoupled weight decay. none: the optimizer's own.", minimum=0)
    clip_norm: float | None = option(
        None, "Bound of the gradient's global norm. none: no clipping.", above=0)
    accumulate_steps: int = option(
        1, "Micro-batches in a step; they share --global_batch_size.", minimum=1)
    ema_decay: float | None = option(
        None, "Decay of the weights' moving average. none: no average.", above=0,
        below=1)
    early_stop: str | None = _setting(
        None, "METRIC:PATIENCE stops after PATIENCE evaluations without a better "
        "validation METRIC and tests the best checkpoint. Losses and errors are better "
        "when lower, others when higher; METRIC:PATIENCE:min or :max says so.")
    jit_compile: bool | str = _setting(
        "auto", "Compile the step with XLA. auto: on one device both are tried in long "
        "runs, once training has begun, and the faster stays; the log says why.",
        choices=("auto",))
    debug_eager: bool = _setting(
        False, "Run in Python, step by step, so that print and pdb work.")
    allow_changed_flags: bool = _setting(
        False, "Resume although flags that change the mathematics differ.")
    on_nonfinite: str = _setting(
        "skip", "After a step whose loss or gradients are not finite, which changes "
        "nothing: go on with the next, or end the run with a report.",
        choices=("skip", "stop"))
    max_consecutive_skips: int = _setting(
        50, "Non-finite steps in a row that end the run.", minimum=1)
    preemption_signal: str = _setting(
        "SIGTERM", "A signal that, like SIGTERM, lets the step end, saves and exits "
        "with code 42.", choices=("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"))
    watchdog_secs: float | None = _setting(
        None, "After so many seconds without a step print what all threads do, and "
        "exit with code 43; what is compiled, saved or exported has ten times as long.",
        above=0)
    export_weights: str = _setting(
        "float32", "For export: float32 weights and computation; compute: both as in "
        "training, the weights stored in the compute dtype.",
        choices=("float32", "compute"))
    saved_model: str | None = _setting(
        None, "For predict: folder of an export to predict --input with; it needs no "
        "run. none: the run's weights.")
    input: str | None = _setting(
        None, "For predict: an .npz file of arrays by name, an image, a folder of "
        "images, or what the experiment reads. none: the test data.")
    output: str | None = _setting(
        None, "For predict an .npz file, for export a folder. none: in the workdir; "
        "with --saved_model, predictions.npz.")
    # fmt: on

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Makes `name = value` of an inherited field a new default for it."""
        super().__init_subclass__(**kwargs)
        for field in dataclasses.fields(cls):  # the decorator has not run: inherited
            value = vars(cls).get(field.name, field)
            if not isinstance(value, dataclasses.Field):
                cls.__annotations__.setdefault(field.name, field.type)
                new = dataclasses.field(default=value, metadata=field.metadata)
                setattr(cls, field.name, new)

    def __post_init__(self) -> None:
        for field in fields_of(type(self)):
            value = checked(field, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        self.validate()

    def validate(self) -> None:
        """Checks fields against each other; a subclass adds its rules after super's.

        Raises:
            ConfigError: the policy is unknown, or two fields contradict each other.
        """
        if self.policy != "auto":
            get_policy(self.policy)
        for first, second in EXCLUSIVE:
            if None not in (getattr(self, first), getattr(self, second)):
                raise ConfigError(
                    f"`{first}` ({getattr(self, first)}) and `{second}` "
                    f"({getattr(self, second)}) say the same thing: set one at most.",
                    f"Leave one out, or unset it: --{second}=none.")
        for name, modes in (("input", "predict"), ("saved_model", "predict"),
                            ("output", "predict or export")):
            if getattr(self, name) is not None and self.mode not in modes.split():
                raise ConfigError(
                    f"`{name}` ({getattr(self, name)}) goes with `mode` {modes} only.",
                    "Leave it out, or use --mode=predict.")
        if self.profile_steps is not None:
            parse_profile_steps(self.profile_steps)
        for name, needed, without in (
            ("saved_model", "input", None),
            ("histogram_every_steps", "summary_every_steps", 0),
        ):
            if getattr(self, name) is not None and getattr(self, needed) == without:
                raise ConfigError(
                    f"`{name}` ({getattr(self, name)}) needs `{needed}`, which is "
                    f"{str(without).lower()}.", f"Set --{needed}, or leave both out.")
        for name, parse in (("early_stop", parse_early_stop),
                            ("best_metric", parse_best_metric)):
            if (text := getattr(self, name)) is not None:
                parse(text)
                if self.mode == "train":
                    raise ConfigError(
                        f"`{name}` ({text}) needs evaluations, and `mode` (train) "
                        "makes none.",
                        f"Use --mode=train_and_eval, or --{name}=none.")

    def changes_math(self, field: dataclasses.Field) -> bool:
        """Says whether another value of the field changes what training computes."""
        if field.name in ("train_steps", "train_epochs"):
            return self.lr_schedule != "constant"
        return field.metadata["math"]


class EarlyStop(typing.NamedTuple):
    """The validation metric watched, the evaluations waited, `min` or `max`."""

    metric: str
    patience: int
    mode: str


def parse_early_stop(text: str) -> EarlyStop:
    """Reads METRIC:PATIENCE or METRIC:PATIENCE:min|max.

    Raises:
        ConfigError: the text is not of this form.
    """
    metric, patience, mode, *rest = f"{text}::".split(":")
    mode = mode or better(metric)
    number = int(patience) if patience.isdecimal() else 0
    if not metric or number < 1 or mode not in ("min", "max") or any(rest):
        raise ConfigError(
            f"`early_stop` ({text}) must be METRIC:PATIENCE, or METRIC:PATIENCE:min or "
            ":max, with a patience of at least 1.",
            "Write for example --early_stop=accuracy:5.")
    return EarlyStop(metric, number, mode)


def parse_best_metric(text: str) -> tuple[str, str]:
    """Reads METRIC or METRIC:min|max; returns the metric, and `min` or `max`.

    Raises:
        ConfigError: the text is not of this form.
    """
    metric, _, mode = text.partition(":")
    mode = mode or better(metric)
    if not metric or mode not in ("min", "max"):
        raise ConfigError(
            f"`best_metric` ({text}) must be METRIC, METRIC:min or METRIC:max.",
            "Write for example --best_metric=accuracy:max.",
        )
    return metric, mode


def parse_profile_steps(text: str) -> tuple[int, int]:
    """Reads FIRST,LAST.

    Raises:
        ConfigError: the text is not of this form.
    """
    first, _, last = text.partition(",")
    if first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last):
        return int(first), int(last)
    raise ConfigError(
        f"`profile_steps` ({text}) must be FIRST,LAST with 1 <= FIRST <= LAST.",
        "Write for example --profile_steps=101,110.")


def better(metric: str) -> str:
    """Says whether a metric of this name is better at its `min` or its `max`."""
    return "min" if any(word in metric for word in LOWER_IS_BETTER) else "max"


def fields_of(config_class: type[RunConfig]) -> tuple[dataclasses.Field, ...]:
    """Returns the fields in order, each with its type resolved.

    Raises:
        ConfigError: the class lacks the decorator, or a field is not an option.
    """
    if "__dataclass_fields__" not in vars(config_class):
        raise ConfigError(
            f"`{config_class.__qualname__}` is a RunConfig without the dataclass "
            "decorator: its own settings would be lost.",
            "Write @dataclasses.dataclass(frozen=True) above the class.")
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        field.type = hints[field.name]
        if not is_option(field):
            raise ConfigError(
                f"`{config_class.__qualname__}.{field.name}` must be an option with "
                "help, of type bool, int, float, str, or a union of these.",
                f'Write {field.name}: int = mpl.option(<default>, "<help>").',
            )
    return dataclasses.fields(config_class)


def merged(config_class: type[RunConfig], *layers: Mapping[str, Any]) -> RunConfig:
    """Makes a config from layers of values, the later ones winning.

    A layer that sets one field of an exclusive pair unsets the other one of earlier
    layers: `--train_steps=100` replaces an experiment's own `train_epochs = 20`.

    Raises:
        ConfigError: a name is unknown, or a value is wrong.
    """
    names = [field.name for field in fields_of(config_class)]
    values: dict[str, Any] = {}
    for layer in layers:
        for name in layer:
            if name not in names:
                raise ConfigError(f"`{name}` is no setting.", suggestion(name, names))
        for pair in EXCLUSIVE:
            for name, other in (pair, pair[::-1]):
                if layer.get(name) is not None:
                    values[other] = None
        values.update(layer)
    return config_class(**values)
