"""What `import mpl` does to Python's garbage collector."""

import gc
import importlib

import pytest

from mpl import imports


def test_what_was_imported_is_not_looked_through_again():
    assert gc.isenabled()
    assert gc.get_freeze_count() > 50_000


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_left_as_it_was(enabled):
    try:
        (gc.enable if enabled else gc.disable)()
        importlib.reload(imports)
        assert gc.isenabled() is enabled
    finally:
        gc.enable()
