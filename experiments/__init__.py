"""Short binaries that train with mpl: `python -m experiments.digits --help`."""

import os

# Before TensorFlow is imported: its start-up lines say nothing of the run.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
