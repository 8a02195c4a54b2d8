"""In: names of dtypes. Out: a policy that casts, and a loss scale that adapts.

`policy.py` says which dtype each part of a model has, `cast.py` casts,
`loss_scale.py` keeps float16 gradients in range. Next: `mpl.step`, one update.
"""

from mpl.precision.cast import cast_floating
from mpl.precision.loss_scale import (
    DynamicLossScale,
    LossScale,
    NoLossScale,
    StaticLossScale,
    get_loss_scale,
)
from mpl.precision.policy import Policy, auto_policy, get_policy

__all__ = [
    "DynamicLossScale",
    "LossScale",
    "NoLossScale",
    "Policy",
    "StaticLossScale",
    "auto_policy",
    "cast_floating",
    "get_loss_scale",
    "get_policy",
]
