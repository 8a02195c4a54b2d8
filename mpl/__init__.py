"""mpl: explicit mixed-precision training loops for TensorFlow, without Keras fit."""

from mpl import imports  # noqa: F401  (first: what comes after imports TensorFlow)
from mpl.data import ArraySource, DataContext, DatasetSource, FileSource
from mpl.errors import CheckpointError, ClusterError, ConfigError, NonFiniteError
from mpl.experiment import Experiment
from mpl.launch.app import load_predictor, run
from mpl.launch.config import RunConfig
from mpl.launch.option import option
from mpl.loop.actions import (
    Conditional,
    EarlyStopping,
    EverySecs,
    EverySteps,
    ExportSavedModel,
    NewBestMetric,
)
from mpl.loop.controller import Controller, Reporter
from mpl.loop.evaluator import Evaluator, EvaluatorOptions
from mpl.loop.trainer import Trainer, TrainerOptions
from mpl.precision.cast import cast_floating
from mpl.precision.loss_scale import DynamicLossScale, NoLossScale, StaticLossScale
from mpl.precision.policy import Policy, get_policy
from mpl.step.gradients import accumulate, apply_together
from mpl.step.loss_scale_optimizer import LossScaleOptimizer
from mpl.step.master_weights import MasterWeights
from mpl.step.remat import remat
from mpl.step.state import LossOutput

__version__ = "0.1.0"

__all__ = [
    "ArraySource",
    "CheckpointError",
    "ClusterError",
    "Conditional",
    "ConfigError",
    "Controller",
    "DataContext",
    "DatasetSource",
    "DynamicLossScale",
    "EarlyStopping",
    "Evaluator",
    "EvaluatorOptions",
    "EverySecs",
    "EverySteps",
    "Experiment",
    "ExportSavedModel",
    "FileSource",
    "LossOutput",
    "LossScaleOptimizer",
    "MasterWeights",
    "NewBestMetric",
    "NoLossScale",
    "NonFiniteError",
    "Policy",
    "Reporter",
    "RunConfig",
    "StaticLossScale",
    "Trainer",
    "TrainerOptions",
    "accumulate",
    "apply_together",
    "cast_floating",
    "get_policy",
    "load_predictor",
    "option",
    "remat",
    "run",
]
