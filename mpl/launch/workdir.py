"""The folder of a run: where it is, the flags it began with, how it goes on."""

import contextlib
import datetime
import errno
import fcntl
import itertools
import os
import tempfile
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf
from absl import logging

from mpl.errors import ConfigError
from mpl.experiment import Experiment
from mpl.launch.config import TRAINING_MODES, RunConfig, fields_of, merged
from mpl.launch.option import read, written

RUNS = "runs"
LATEST = "latest"
FLAGFILE = "flagfile.txt"
_FULL = [os.strerror(n) for n in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)]
# What concerns one command and not the run.
PER_COMMAND = (
    "workdir", "resume", "allow_changed_flags", "input", "output", "saved_model",
    "device_report", "visible_devices", "gpu_memory_limit_mb", "tpu", "cluster_timeout",
)  # fmt: skip


def find_run(config: RunConfig, experiment: str) -> str | None:
    """Returns the folder of the run that a command goes on with; None: a new run.

    Args:
        config: settings, of which `mode`, `workdir` and `resume` count.
        experiment: its name.

    Raises:
        ConfigError: the command needs a run, and there is none, or the folder is one
            of another experiment.
    """
    new = config.mode in TRAINING_MODES and not config.resume
    if config.workdir is None and new:
        return None
    path = config.workdir or os.path.join(RUNS, experiment, LATEST)
    if tf.io.gfile.exists(os.path.join(path, FLAGFILE)):
        if config.workdir is None and os.path.islink(path):
            path = os.path.join(os.path.dirname(path), os.readlink(path))
        if (owner := read_facts(path).get("experiment", experiment)) != experiment:
            raise ConfigError(
                f"`workdir` ({path}) holds a run of {owner}, not of {experiment}.",
                "Give another folder: --workdir=<folder>.")
        return path
    if new:
        if tf.io.gfile.exists(os.path.join(path, "checkpoints")):
            logging.warning("%s has checkpoints, but no %s to check", path, FLAGFILE)
        return None
    what = "`resume`" if config.mode in TRAINING_MODES else f"`mode` ({config.mode})"
    raise ConfigError(
        f"{what} needs a run of {experiment}, and `workdir` ({path}) holds none.",
        "Train first (--mode=train_and_eval), or name its folder: --workdir=<folder>.")


def check_writable(path: str) -> None:
    """Tries a file in `path`, or in its nearest parent that exists; leaves nothing.

    Raises:
        ConfigError: files cannot be written there.
    """
    if "://" in path:
        return  # an object store answers at the first write
    folder = os.path.abspath(path)
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(path, error) from error


def create(workdir: str | None, experiment: str) -> str:
    """Makes the folder of a run and returns it.

    Args:
        workdir: the folder, which may exist; None: a new `runs/<experiment>/<time>`,
            with `latest` beside it pointing to it.
        experiment: its name.

    Raises:
        ConfigError: the folder cannot be made.
    """
    folder = os.path.join(RUNS, experiment)
    try:
        if workdir is not None:
            tf.io.gfile.makedirs(workdir)
            return workdir
        stamp = f"{datetime.datetime.now():%Y%m%d-%H%M%S}"
        for number in itertools.count():
            path = os.path.join(folder, stamp + (f"-{number}" * bool(number)))
            with contextlib.suppress(FileExistsError):  # another run took the name
                os.makedirs(path)
                break
        # Replacing a link is atomic, so that `latest` exists at any time.
        os.symlink(os.path.basename(path), path + ".link")
        os.replace(path + ".link", os.path.join(folder, LATEST))
        return path
    except (OSError, tf.errors.OpError) as error:
        raise _unwritable(workdir or folder, error) from error


def _unwritable(path: str, error: Exception) -> ConfigError:
    reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
    return ConfigError(
        f"`workdir` ({path}) must be a folder that takes files: {reason}.",
        "Give another folder: --workdir=<folder>.")


@contextlib.contextmanager
def naming_full_disk() -> Iterator[None]:
    """Makes the error of a file that a disk does not take one that says what to do.

    Raises:
        ConfigError: no space is left, or the disk has become read-only.
    """
    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        reason = str(error).partition("\n")[0]
        if not any(text in reason for text in _FULL):
            raise
        raise ConfigError(
            f"A file cannot be written: {reason}.",
            "Make room there and start the same command again: it goes on from the "
            "last checkpoint.") from error


def lock(workdir: str) -> contextlib.AbstractContextManager:
    """Keeps others from training in the folder until it is closed or the process ends.

    Raises:
        ConfigError: another process trains there.
    """
    if "://" in workdir:  # an object store has no locks
        return contextlib.nullcontext()
    file = open(os.path.join(workdir, "lock"), "a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        cause = f"`workdir` ({workdir}) is in use by process {file.read()}."
        raise ConfigError(cause, "Let it end, or use another --workdir.") from error
    except OSError:  # a file system without locks
        return file
    file.truncate(0)
    print(os.getpid(), end="", file=file, flush=True)
    return file


def is_free(workdir: str) -> bool:
    """Says whether it is known that no other process trains in the folder."""
    try:
        with lock(workdir):
            return "://" not in workdir
    except (ConfigError, OSError):
        return False


def write_flagfile(workdir: str, config: RunConfig, facts: Mapping = {}) -> str:
    """Writes all settings that make the run, and returns the file's path.

    `--flagfile=` of it repeats the run in another folder; `facts` are comments there.
    """
    lines = [f"# {name}: {fact}\n" for name, fact in facts.items()]
    lines += [
        f"--{field.name}={written(getattr(config, field.name))}\n"
        for field in fields_of(type(config))
        if field.name not in PER_COMMAND
    ]
    path = os.path.join(workdir, FLAGFILE)
    replace(path, "".join(lines))
    return path


def replace(path: str, text: str) -> None:
    """Writes a file so that readers see the old text or the new one, never a part."""
    with tf.io.gfile.GFile(path + ".new", "w") as file:
        file.write(text)
    tf.io.gfile.rename(path + ".new", path, overwrite=True)


def read_flagfile(workdir: str) -> dict[str, str]:
    """Returns the texts that `write_flagfile` wrote, by name, `mode` excepted."""
    pairs = _pairs(workdir, "--", "=")
    return {name: text for name, text in pairs.items() if name != "mode"}


def recorded(config_class: type[RunConfig], record: Mapping[str, str]) -> dict:
    """Returns the values of a record of `read_flagfile`, but for unknown flags."""
    fields = fields_of(config_class)
    return {f.name: read(f, record[f.name]) for f in fields if f.name in record}


def facts_of(experiment: Experiment) -> dict[str, str]:
    """Returns what a flagfile says of an experiment beyond its flags, by name."""
    examples = written(experiment.num_examples["train"])
    return {"experiment": experiment.name, "training examples": examples}


def read_facts(workdir: str) -> dict[str, str]:
    """Returns the facts that `write_flagfile` wrote, by name."""
    return _pairs(workdir, "# ", ": ")


def _pairs(workdir: str, start: str, between: str) -> dict[str, str]:
    with tf.io.gfile.GFile(os.path.join(workdir, FLAGFILE)) as file:
        lines = [line.strip() for line in file.read().splitlines()]
    pairs = [line.partition(between) for line in lines if line.startswith(start)]
    return {name.removeprefix(start): text for name, _, text in pairs}


class Change(typing.NamedTuple):
    """A setting that a run goes on with in another value; `math`: it matters."""

    name: str
    old: str
    new: str
    math: bool

    def __str__(self) -> str:
        return f"{self.name} {self.old} -> {self.new}"


def go_on(
    config_class: type[RunConfig], record: Mapping[str, str],
    defaults: Mapping[str, Any], given: Mapping[str, Any],
) -> RunConfig:
    """Makes the config with which a run goes on, and prints what it changes.

    A setting that the command does not give keeps the run's own value. `policy=auto`
    too: the run has chosen, and another device must not choose anew.

    Args:
        config_class: the experiment's settings.
        record: what `read_flagfile` returned.
        defaults: values that the program sets in code.
        given: values that the command gives.

    Returns:
        The config.

    Raises:
        ConfigError: training would go on with other mathematics, see `accept`.
    """
    fields = {field.name: field for field in fields_of(config_class)}
    old = recorded(config_class, record)
    new = {n: v for n, v in given.items() if (n, v) != ("policy", "auto")}
    config = merged(config_class, defaults, old, new)
    changes = []
    for name, text in record.items():
        if name not in fields:
            changes.append(Change(name, text, "(no such flag)", True))
        elif (value := getattr(config, name)) != old[name]:
            matters = config.changes_math(fields[name])
            changes.append(Change(name, text, written(value), matters))
    accept(config, changes)
    return config


def accept(config: RunConfig, changes: Sequence[Change]) -> None:
    """Prints the changes with which a run goes on.

    Raises:
        ConfigError: one changes what training computes, and `allow_changed_flags` is
            not set.
    """
    matter = "; ".join(str(change) for change in changes if change.math)
    if matter and config.mode in TRAINING_MODES and not config.allow_changed_flags:
        raise ConfigError(
            f"What changes the mathematics differs from the run's: {matter}.",
            "Leave them out to go on as before, add --allow_changed_flags to go on "
            "with them, or train in another --workdir.")
    for change in changes:
        print(f"Changed since the run began: {change}")
