"""Imports Keras and TensorFlow while Python's garbage collector rests.

What an import makes stays. The collector would look through it again and again while it
grows, and once more when the process ends: a third of the time of a program that only
imports (measured in BUILD_NOTES.md). What is there by the end of the import it leaves
alone for good, but not in a notebook or a shell, where models may be there already.
"""

import gc
import sys

_collects = gc.isenabled()
gc.disable()
try:
    import keras  # noqa: F401
finally:
    if _collects:
        gc.enable()
if not hasattr(sys, "ps1"):
    gc.freeze()
