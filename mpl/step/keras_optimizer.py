"""The inner optimizer and its learning-rate schedule, from their flags."""

import inspect
import math

import keras
import tensorflow as tf

from mpl.errors import ConfigError

_SCHEDULES = ("constant", "cosine", "linear", "step")


@keras.saving.register_keras_serializable(package="mpl")
class WarmupSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that rises linearly from 0 to its peak, then decays.

        rate = peak * min(1, step / warmup_steps)
        progress = (step - warmup_steps) / (train_steps - warmup_steps), in [0, 1]
        constant:  rate
        cosine:    rate * (1 + cos(pi * progress)) / 2
        linear:    rate * (1 - progress)
        step:      rate, / 10 from 50 % of train_steps on, / 100 from 75 % on

    `step` counts applied updates: the first one has step 0, so that with a warm-up
    it moves nothing but the slots.

    Args:
        kind: `constant`, `cosine`, `linear` or `step`.
        peak: the learning rate after the warm-up.
        warmup_steps: steps of the warm-up; 0 for none.
        train_steps: steps of the whole training, warm-up included.

    Source: Goyal et al., arXiv:1706.02677 (warm-up, step); Loshchilov and Hutter,
    arXiv:1608.03983 (cosine).
    """

    def __init__(self, kind: str, peak: float, warmup_steps: int, train_steps: int):
        self.kind, self.peak = kind, peak
        self.warmup_steps, self.train_steps = warmup_steps, train_steps

    def __call__(self, step):
        """Returns the float32 learning rate of an update."""
        step = tf.cast(step, tf.float32)
        rate = tf.constant(self.peak, tf.float32)
        if self.warmup_steps:
            rate *= tf.minimum(1.0, step / self.warmup_steps)
        decay_steps = max(self.train_steps - self.warmup_steps, 1)
        progress = (step - self.warmup_steps) / decay_steps
        progress = tf.clip_by_value(progress, 0.0, 1.0)
        if self.kind == "cosine":
            return rate * 0.5 * (1.0 + tf.cos(math.pi * progress))
        if self.kind == "linear":
            return rate * (1.0 - progress)
        if self.kind == "step":
            rate *= tf.where(step >= 0.5 * self.train_steps, 0.1, 1.0)
            return rate * tf.where(step >= 0.75 * self.train_steps, 0.1, 1.0)
        return rate

    def get_config(self):
        """Returns the arguments of the constructor."""
        return {
            "kind": self.kind,
            "peak": self.peak,
            "warmup_steps": self.warmup_steps,
            "train_steps": self.train_steps,
        }


def make_optimizer(
    name: str,
    *,
    learning_rate: float,
    lr_schedule: str,
    warmup_steps: int,
    train_steps: int,
    weight_decay: float | None = None,
    **kwargs,
) -> keras.optimizers.Optimizer:
    """Makes a Keras optimizer with its learning-rate schedule.

    Args:
        name: any Keras optimizer in any case (`adam`, `SGD`, `Lamb`), or one that was
            registered with Keras (`package>Name`).
        learning_rate: the highest learning rate, at least 0.
        lr_schedule: `constant`, `cosine`, `linear` or `step` (see `WarmupSchedule`).
        warmup_steps: steps over which the learning rate rises from 0.
        train_steps: applied steps of the whole training.
        weight_decay: the optimizer's; None leaves its own default.
        **kwargs: other arguments of the optimizer, such as `momentum`.

    Returns:
        The optimizer. A constant rate without warm-up is a variable that can be
        assigned, anything else is a `WarmupSchedule`.

    Raises:
        ConfigError: an unknown name, schedule or argument, or a wrong number.
    """
    known = _known_optimizers()
    registered = keras.saving.get_registered_object(name)
    optimizer_class = known.get(str(name).lower(), registered)
    if optimizer_class is None:
        names = sorted(known_class.__name__ for known_class in known.values())
        raise ConfigError(
            f"`optimizer` ({name}) is not a Keras optimizer.",
            f"Use one of {', '.join(names)}, in any case.",
        )
    if lr_schedule not in _SCHEDULES:
        raise ConfigError(
            f"`lr_schedule` ({lr_schedule}) is not known.",
            f"Use one of {', '.join(_SCHEDULES)}.",
        )
    if not 0 <= learning_rate < float("inf"):
        raise ConfigError(
            f"`learning_rate` ({learning_rate}) must be finite and at least 0.",
            "Try 1e-3 for adam, 1e-1 for sgd.",
        )
    if not 0 <= warmup_steps <= train_steps:
        raise ConfigError(
            f"`warmup_steps` ({warmup_steps}) must lie between 0 and train_steps "
            f"({train_steps}).",
            "Train for longer, or warm up for less.",
        )
    rate: float | WarmupSchedule = float(learning_rate)
    if lr_schedule != "constant" or warmup_steps:
        rate = WarmupSchedule(lr_schedule, rate, warmup_steps, train_steps)
    if weight_decay is not None:
        kwargs["weight_decay"] = weight_decay
    try:
        return optimizer_class(learning_rate=rate, **kwargs)
    except (TypeError, ValueError) as error:
        arguments = list(inspect.signature(optimizer_class).parameters)
        raise ConfigError(
            f"`optimizer` ({name}) refuses its arguments: {error}",
            f"It takes {', '.join(arguments)}.",
        ) from error


def _known_optimizers() -> dict[str, type]:
    """Returns Keras's optimizers by lower-case name, those that wrap others aside.

    `keras.optimizers.get` knows all but Lamb, and the wrappers, which fail in it.
    """
    return {
        name.lower(): member
        for name, member in vars(keras.optimizers).items()
        if inspect.isclass(member)
        and issubclass(member, keras.optimizers.Optimizer)
        and "learning_rate" in inspect.signature(member).parameters
    }
