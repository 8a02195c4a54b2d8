"""One absl flag for every field of a config class, in a registry of its own."""

import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from mpl.errors import ConfigError
from mpl.launch.config import RunConfig, fields_of
from mpl.launch.option import kinds, read, rule, suggestion, written

EVERYDAY = (
    "mode", "workdir", "resume", "data_dir", "policy", "loss_scale", "strategy",
    "num_devices", "global_batch_size", "train_steps", "train_epochs", "optimizer",
    "learning_rate", "lr_schedule", "seed",
)  # fmt: skip
HELP = ("help", "helpshort", "helpfull")
HELP_LINES = 60


class _Parser(flags.ArgumentParser):
    """Reads a text by the field's type; the config checks the value."""

    def __init__(self, *, field):  # by keyword: absl keeps no cache of such parsers
        self.field = field
        self.syntactic_help = rule(field)

    def parse(self, argument):
        return read(self.field, argument) if isinstance(argument, str) else argument


def define(
    config_class: type[RunConfig], defaults: Mapping[str, Any] = {}
) -> flags.FlagValues:
    """Returns a new registry with one flag per field of `config_class`."""
    values = flags.FlagValues()
    for field in fields_of(config_class):
        flag = flags.Flag(
            _Parser(field=field), None, field.name,  # nothing serializes it
            defaults.get(field.name, field.default), field.metadata["help"],
            boolean=kinds(field) == {bool})
        flags.DEFINE_flag(flag, values, module_name=config_class.__module__)
    return values


def parse(
    config_class: type[RunConfig], argv: Sequence[str], *,
    defaults: Mapping[str, Any] = {}, program: str = "python <file>",
    description: str = "",
) -> dict[str, Any]:
    """Reads a command line.

    Flags that the process itself has defined through absl (`--verbosity`, a script's
    own) are read with it.

    Args:
        config_class: the experiment's settings.
        argv: the program's name, then its arguments.
        defaults: values that stand for the fields' own defaults in the help.
        program: command that starts the program, for the help.
        description: first line of the help.

    Returns:
        The values of the flags given, and only of those.

    Raises:
        ConfigError: a flag is unknown or defined twice, or its text cannot be read.
        SystemExit: with code 0, after `--help` or `--helpfull`.
    """
    own = [field.name for field in fields_of(config_class)]
    try:
        values = define(config_class, defaults)
        for name in HELP:
            flags.DEFINE_boolean(name, False, "Show help.", values)
        for name in flags.FLAGS:  # absl's `app` may have defined its own help there
            if name not in (*HELP, "helpxml") and name == flags.FLAGS[name].name:
                values[name] = flags.FLAGS[name]
        rest = values(list(argv))[1:]
    except flags.UnrecognizedFlagError as error:
        cause = f"`--{error.flagname}` is no flag of this program."
        raise ConfigError(cause, suggestion(error.flagname, own)) from error
    except (flags.Error, ValueError) as error:
        cause = str(error).replace("\n", " ")
        raise ConfigError(cause, "--helpfull lists all flags.") from error
    if rest:
        cause = f"`{rest[0]}` is an argument without a flag's name."
        raise ConfigError(cause, "Write --name=value; --helpfull lists all flags.")
    if any(values[name].value for name in HELP):
        head = [line for line in description.strip().split("\n")[:1] if line]
        head += [f"Usage: {program} [--flag=value ...]", ""]
        print(*head, sep="\n")
        print(full_help(values, own) if values["helpfull"].value else
              short_help(config_class, values, HELP_LINES - len(head)))
        sys.exit(0)
    return {name: values[name].value for name in own if values[name].present}


def short_help(
    config_class: type[RunConfig], values: flags.FlagValues, room: int
) -> str:
    """Returns the everyday flags and the experiment's own, in at most `room` lines."""
    base = {field.name for field in fields_of(RunConfig)}
    own = [f.name for f in fields_of(config_class) if f.name not in base]
    lines = [line for name in EVERYDAY for line in _entry(values[name])]
    if own:
        lines += ["", f"Of {config_class.__qualname__.split('.')[0]}:"]
    entries = [_entry(values[name]) for name in own]
    room -= len(lines) + 2
    if sum(map(len, entries)) > room:
        entries = [entry[:1] for entry in entries[:room]]
    tail = "--flagfile=FILE reads flags from a file; --helpfull shows all flags."
    return "\n".join([*lines, *sum(entries, []), "", tail])


def full_help(values: flags.FlagValues, own: Sequence[str]) -> str:
    """Returns every flag with its rule, then those that absl has in this process."""
    lines = [line for name in own for line in _entry(values[name], full=True)]
    return "\n".join([*lines, "", "Of absl and libraries:", flags.FLAGS.get_help()])


def _entry(flag: Any, full: bool = False) -> list[str]:
    text = f"--{flag.name}={written(flag.default)}  {flag.help}"
    if full or flag.parser.field.metadata["choices"]:
        text += f" ({flag.parser.syntactic_help})"
    return textwrap.wrap(text, 88, subsequent_indent="      ")
