"""What `import mpl` does to Python's garbage collector."""

import gc
import importlib
import sys

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


def test_in_a_shell_nothing_is_kept_for_good(monkeypatch):
    frozen = gc.get_freeze_count()
    try:
        gc.unfreeze()
        monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
        importlib.reload(imports)
        assert gc.get_freeze_count() == 0
    finally:
        monkeypatch.undo()
        importlib.reload(imports)
    assert gc.get_freeze_count() >= frozen
