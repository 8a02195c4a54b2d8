"""In: a step and data. Out: many steps, reported, evaluated, saved, ended in time.

`trainer.py` and `evaluator.py` run blocks of steps, with `inner_loop.py` in common;
`controller.py` decides what happens between blocks, `actions.py` holds what may.
Next: `mpl.record`, state out.
"""

from mpl.loop.actions import Conditional, EarlyStopping, EverySecs, EverySteps
from mpl.loop.actions import ExportSavedModel, NewBestMetric
from mpl.loop.controller import Controller, Reporter
from mpl.loop.evaluator import Evaluator, EvaluatorOptions
from mpl.loop.inner_loop import EndOfDataError
from mpl.loop.interrupt import Interrupt
from mpl.loop.trainer import Trainer, TrainerOptions
from mpl.loop.watchdog import Watchdog

__all__ = [
    "Conditional", "Controller", "EarlyStopping", "EndOfDataError", "Evaluator",
    "EvaluatorOptions", "EverySecs", "EverySteps", "ExportSavedModel", "Interrupt",
    "NewBestMetric", "Reporter", "Trainer", "TrainerOptions", "Watchdog",
]
