"""How often a run logs, evaluates and saves."""

from typing import Any

from mpl.errors import ConfigError
from mpl.launch.config import RunConfig


def intervals(
    config: RunConfig, train_steps: int, batches_per_epoch: int | None
) -> dict[str, Any]:
    """Returns all intervals of a `Controller`: those set, and rules for the others.

    Raises:
        ConfigError: epochs are asked for, and nobody knows how long one is.
    """
    epoch = batches_per_epoch or 0
    if config.eval_every_epochs and not epoch:
        raise ConfigError(
            f"`eval_every_epochs` ({config.eval_every_epochs}) needs training data of "
            "known length.",
            "Use --eval_every_steps, or give the DatasetSource `num_examples`.",
        )
    default = train_steps if config.train_steps or not epoch else epoch
    evaluate = (config.eval_every_epochs or 0) * epoch or default
    evaluate = config.eval_every_steps or evaluate
    often = 100 if config.train_steps else default
    log = config.log_every_steps or min(evaluate, often)
    save = config.checkpoint_every_steps or min(evaluate, 1000)
    summary = config.summary_every_steps or log
    shortest = min(100, evaluate, log, save, summary)
    return {
        "steps_per_loop": config.steps_per_loop or shortest,
        "log_every_steps": log,
        "eval_every_steps": evaluate,
        "checkpoint_every_steps": save,
        "summary_interval": summary,
    }
