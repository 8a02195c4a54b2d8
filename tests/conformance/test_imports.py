"""What `import mpl` does to Python's garbage collector."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow  # each imports TensorFlow anew


def after(code):
    """Returns what the collector is like in a program that begins with the code."""
    code = f"import gc, sys\n{code}\nprint(gc.isenabled(), gc.get_freeze_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          timeout=120, check=True)
    enabled, frozen = done.stdout.split()
    return enabled == "True", int(frozen)


@pytest.mark.parametrize("first", ["", "import keras, tensorflow"])
def test_what_was_imported_is_not_looked_through_again(first):
    enabled, frozen = after(f"{first}\nimport mpl")
    assert enabled and frozen > 50_000


def test_the_collector_is_left_off_and_nothing_is_frozen_in_a_shell():
    code = "gc.disable()\nsys.ps1 = '>>> '\nimport mpl"
    assert after(code) == (False, 0)
