"""Binaries, each short: `python -m experiments.digits --help`."""
