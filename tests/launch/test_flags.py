"""Command lines: what is read, what is refused, what the help shows."""

import dataclasses

import pytest
from absl import flags as absl_flags

from mpl.errors import ConfigError
from mpl.launch import flags
from mpl.launch.config import RunConfig, fields_of, merged
from mpl.launch.option import option


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    train_epochs = 20
    hidden: int = option(64, "Units of the hidden layer.", minimum=1)


@dataclasses.dataclass(frozen=True)
class Other(RunConfig):
    hidden: str = option("wide", "Name of the hidden layer.")


def parse(*arguments, config_class=Config, **kwargs):
    return flags.parse(config_class, ["program", *arguments], **kwargs)


def test_only_the_flags_given_are_returned_in_their_types():
    given = parse("--hidden=32", "--learning_rate", "0.01", "--deterministic",
                  "--noresume", "--loss_scale=128", "--train_epochs=none")  # fmt: skip
    assert given == {
        "hidden": 32, "learning_rate": 0.01, "deterministic": True, "resume": False,
        "loss_scale": 128.0, "train_epochs": None,
    }  # fmt: skip
    assert parse() == {}


def test_every_field_has_its_flag_with_help_and_default():
    values = flags.define(Config, {"seed": 7})
    assert list(values) == [field.name for field in fields_of(Config)]
    assert all(values[name].help for name in values)
    assert values["train_epochs"].default == 20 and values["seed"].default == 7


def test_two_experiments_do_not_meet_and_absl_gets_no_flag_of_ours():
    before = set(absl_flags.FLAGS)
    assert parse("--hidden=3") == {"hidden": 3}
    assert parse("--hidden=3", config_class=Other) == {"hidden": "3"}
    assert parse("--hidden=4") == {"hidden": 4}
    assert set(absl_flags.FLAGS) == before


def test_flags_of_absl_and_of_the_script_are_read_too():
    absl_flags.DEFINE_string("color_of_the_test", "red", "A script's own flag.")
    try:
        assert parse("--color_of_the_test=blue", "--seed=1") == {"seed": 1}
        assert absl_flags.FLAGS["color_of_the_test"].value == "blue"
    finally:
        del absl_flags.FLAGS.color_of_the_test


def test_a_flag_defined_twice_is_an_error():
    absl_flags.DEFINE_integer("hidden", 1, "The same name.")
    try:
        with pytest.raises(ConfigError, match="'hidden' is defined twice"):
            parse()
    finally:
        del absl_flags.FLAGS.hidden


@pytest.mark.parametrize(
    "arguments, cause, remedy",
    [
        (["--hiden=3"], "`--hiden` is no flag", "Did you mean --hidden?"),
        (["--xyzzy"], "`--xyzzy` is no flag", "--helpfull lists all"),
        (["eval"], "`eval` is an argument without a flag", "--name=value"),
        (["--seed"], "Missing value for flag --seed", "--helpfull"),
        (["--noresume=1"], "does not take an argument", "--helpfull"),
        (["--flagfile=/no/such/file"], "Unable to open flagfile", "--helpfull"),
    ],
)
def test_what_cannot_be_read(arguments, cause, remedy):
    with pytest.raises(ConfigError) as caught:
        parse(*arguments)
    assert cause in caught.value.cause and remedy in caught.value.remedy
    assert str(caught.value).count("\n") == 1


def test_a_wrong_value_is_refused_by_the_config():
    with pytest.raises(ConfigError, match="`hidden` .abc. must be an integer"):
        merged(Config, parse("--hidden=abc"))


def test_a_flagfile_stands_where_it_is_named(tmp_path):
    file = tmp_path / "flags.txt"
    file.write_text("# comment\n--hidden=5\n--seed=3\n--train_epochs=none\n")
    given = parse(f"--flagfile={file}", "--seed=4")
    assert given == {"hidden": 5, "seed": 4, "train_epochs": None}


def help_of(capsys, *arguments, config_class=Config):
    with pytest.raises(SystemExit) as caught:
        parse(*arguments, config_class=config_class, program="python -m digits",
              description="Trains a CNN.\n\nMore.")  # fmt: skip
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_help_shows_the_everyday_flags_and_the_experiments_own(capsys):
    text = help_of(capsys, "--help")
    lines = text.splitlines()
    assert len(lines) <= 60 and all(len(line) <= 88 for line in lines)
    assert lines[:2] == ["Trains a CNN.", "Usage: python -m digits [--flag=value ...]"]
    shown = [line.split("=")[0][2:] for line in lines if line.startswith("--")]
    assert shown == [*flags.EVERYDAY, "hidden", "flagfile"]
    assert len(flags.EVERYDAY) == 15
    assert "--train_epochs=20  " in text
    assert help_of(capsys, "--helpshort") == text


def test_help_stays_within_sixty_lines_with_many_flags(capsys):
    many = dataclasses.make_dataclass(
        "Many",
        [(f"own_{i}", int, option(i, "Very long help. " * 20)) for i in range(80)],
        bases=(RunConfig,),
        frozen=True,
    )
    text = help_of(capsys, "--help", config_class=many)
    assert len(text.splitlines()) <= 60 and "--own_0=0" in text


def test_helpfull_shows_every_flag_with_its_rule(capsys):
    text = help_of(capsys, "--helpfull")
    for field in fields_of(Config):
        assert f"--{field.name}=" in text
    assert "(an integer at least 1)" in text and "--flagfile" in text
