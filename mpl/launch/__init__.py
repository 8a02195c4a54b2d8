"""Enters: a command line, or keyword arguments in a notebook, and an experiment class.
Leaves: a run: its folder, its metrics, its last line.
Next: `mpl.distribute` makes the strategy on which the experiment is set up.
"""

from mpl.launch.app import run
from mpl.launch.config import RunConfig
from mpl.launch.option import option

__all__ = ["RunConfig", "option", "run"]
