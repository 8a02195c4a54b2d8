"""The flag --momentum of binaries."""

from typing import Any

import keras

import mpl


def set_momentum(
    optimizer: keras.optimizers.Optimizer, config: Any,
    *kinds: type[keras.optimizers.Optimizer],
) -> None:
    """Gives an optimizer of one of the kinds the momentum of the flags.

    Raises:
        ConfigError: it is of no such kind, and the momentum is not the flag's default.
    """
    if isinstance(optimizer, kinds):
        optimizer.momentum = config.momentum  # its slots are made later
    elif config.momentum != type(config).momentum:
        names = " or ".join(f"--optimizer={kind.__name__.lower()}" for kind in kinds)
        raise mpl.ConfigError(
            f"`momentum` ({config.momentum}) has no effect on `optimizer` "
            f"({config.optimizer}).", f"Leave it out, or use {names}.")
