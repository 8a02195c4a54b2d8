"""All that the next step depends on is in a checkpoint, and has left its first value."""

import re

from tests.drill.compare import state
from tests.drill.drill import Drill, Row

# The entries of each kind, by what is in their names.
KINDS = {
    "weights": r"^model/.*(kernel|bias|gamma|beta)",
}


def rows(drill: Drill) -> list[Row]:
    """Looks for each kind in the checkpoints of the undisturbed runs."""
    return []
