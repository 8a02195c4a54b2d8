"""What an inner optimizer must be, to be one part of a step."""

import keras
import tensorflow as tf

from mpl import errors
from mpl.step import binding as binding_lib

# Settings of Keras's optimizers that this one replaces, and by what.
_REPLACED = {
    "clipnorm": "clip_norm of LossScaleOptimizer (the global norm)",
    "clipvalue": "clip_norm of LossScaleOptimizer",
    "global_clipnorm": "clip_norm of LossScaleOptimizer",
    "use_ema": "ema_decay of LossScaleOptimizer",
    "gradient_accumulation_steps": "mpl.accumulate",
    "loss_scale_factor": "loss_scale of LossScaleOptimizer",
}


def check(inner: keras.optimizers.Optimizer) -> None:
    """Raises ConfigError for an optimizer that would do a part of the step itself.

    Also for one with state outside `update_step`, which a loop that calls `update_step`
    alone would leave behind, and for another strategy's.
    """
    if not isinstance(inner, keras.optimizers.Optimizer):
        raise errors.ConfigError(
            f"`inner` is a {type(inner).__name__}; it must be a Keras optimizer.",
            "Pass an instance, such as keras.optimizers.AdamW(1e-3).",
        )
    if isinstance(inner, keras.optimizers.LossScaleOptimizer):
        raise errors.ConfigError(
            "`inner` is Keras's LossScaleOptimizer, which would scale a second time.",
            "Pass the optimizer inside it, and the scale as `loss_scale`.",
        )
    if inner.built:
        raise errors.ConfigError(
            f"`inner` ({inner.name}) was built before.", "Pass a fresh optimizer."
        )
    for setting, ours in _REPLACED.items():
        if getattr(inner, setting, None):
            raise errors.ConfigError(
                f"the inner optimizer sets `{setting}`, which would act on scaled or "
                "unreduced gradients.",
                f"Leave it unset and use {ours}.",
            )
    if binding_lib.excludes_from_decay(inner):
        raise errors.ConfigError(
            "`exclude_from_weight_decay` was called on the inner optimizer.",
            "Name the variables in `no_decay` of MasterWeights.",
        )
    _check_update_step(inner)
    _check_scope(inner)


def check_masters(inner: keras.optimizers.Optimizer, dtypes: set[tf.DType]) -> None:
    """Raises ConfigError for masters of too few bits: Adam's rule would move nothing.

    It corrects its bias by 1 - beta_2 ** step in the master's dtype; Keras's 0.999 is 1
    in bfloat16.
    """
    beta = getattr(inner, "beta_2", None)
    for dtype in dtypes if beta is not None and beta < 1 else ():
        if tf.cast(beta, dtype) == 1:
            raise errors.ConfigError(
                f"`beta_2` ({beta}) of {type(inner).__name__} is 1 in the masters' "
                f"{dtype.name}: it would not move them.",
                "Use a mixed policy (float32 masters), SGD, or a beta_2 up to 0.996.",
            )


def _check_update_step(inner: keras.optimizers.Optimizer) -> None:
    outside = "apply _backend_update_step _backend_apply_gradients _apply_weight_decay"
    known = keras.optimizers.Optimizer, keras.optimizers.Nadam, keras.optimizers.Muon
    for kind in type(inner).__mro__:
        if kind in known:
            return
        overridden = [name for name in outside.split() if name in vars(kind)]
        if overridden:
            raise errors.ConfigError(
                f"the inner optimizer {type(inner).__name__} overrides "
                f"`{overridden[0]}`; only its `update_step` would be called.",
                "Move the rule into `update_step`, or use another optimizer.",
            )


def _check_scope(inner: keras.optimizers.Optimizer) -> None:
    strategy = tf.distribute.get_strategy()
    if not strategy.extended.variable_created_in_scope(inner.iterations.value):
        raise errors.ConfigError(
            f"`inner` ({inner.name}) was created outside the current strategy "
            f"({type(strategy).__name__}).",
            "Create it and LossScaleOptimizer inside the model's `strategy.scope()`.",
        )
