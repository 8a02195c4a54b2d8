"""The settings of a run: values, rules, defaults of a subclass, layers."""

import dataclasses
import inspect
import pathlib
import re

import numpy as np
import pytest

from mpl.errors import ConfigError
from mpl.launch.config import (
    EarlyStop,
    RunConfig,
    better,
    fields_of,
    merged,
    parse_early_stop,
)
from mpl.launch.option import option, read, written


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    train_epochs = 20  # a new default without repeating the type
    learning_rate: float = 3e-3
    hidden: int = option(64, "Units of the hidden layer.", minimum=1)
    note: str | None = option(None, "Free text.", math=False)

    def validate(self):
        super().validate()
        if self.hidden % 2:
            raise ConfigError(f"`hidden` ({self.hidden}) must be even.", "Use 64.")


FIELDS = {field.name: field for field in fields_of(Config)}


def test_defaults_of_a_subclass_and_its_own_fields():
    config = Config()
    assert (config.train_epochs, config.learning_rate, config.hidden) == (20, 3e-3, 64)
    assert RunConfig().train_epochs is None and RunConfig().learning_rate == 1e-3
    # The rule and the help of an inherited field stay with its new default.
    assert FIELDS["learning_rate"].metadata == next(
        f.metadata for f in fields_of(RunConfig) if f.name == "learning_rate"
    )
    with pytest.raises(ConfigError, match="`learning_rate` .-1.* at least 0"):
        Config(learning_rate=-1)


def test_a_config_is_frozen_and_describes_every_field():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().hidden = 2
    attributes = inspect.getdoc(RunConfig).split("Attributes:")[1]
    documented = re.findall(r"^    (\w+): ", attributes, re.MULTILINE)
    assert documented == [field.name for field in fields_of(RunConfig)]


@pytest.mark.parametrize(
    "name, value, rule, remedy",
    [
        ("mode", "trian", "must be train, train_and_eval,", "--mode=train."),
        ("global_batch_size", 0, "must be an integer at least 1", "=64, its default"),
        ("global_batch_size", 2.5, "must be an integer", "=64"),
        ("global_batch_size", True, "must be an integer", "=64"),
        ("global_batch_size", None, "must be an integer", "=64"),
        ("train_steps", -1, "an integer at least 1 or none", "=none, its default"),
        ("learning_rate", float("nan"), "a number at least 0", "=0.001"),
        ("learning_rate", "fast", "a number at least 0", "=0.001"),
        ("loss_scale", 0, "auto, none, dynamic or a number above 0", "=auto"),
        ("loss_scale", "dynamc", "auto, none, dynamic or", "=dynamic."),
        ("ema_decay", 1.0, "a number above 0 and below 1 or none", "=none"),
        ("seed", 2**31, "at least 0 and at most 2147483647", "=0"),
        ("deterministic", 1, "true or false", "=false"),
        ("workdir", "two\nlines", "text or none", "=none"),
    ],
)
def test_a_wrong_value_names_flag_value_rule_and_remedy(name, value, rule, remedy):
    with pytest.raises(ConfigError) as caught:
        RunConfig(**{name: value})
    assert caught.value.cause.startswith(f"`{name}` ({value}) must be ")
    assert rule in caught.value.cause
    assert f"--{name}" in caught.value.remedy and remedy in caught.value.remedy


def test_values_take_the_type_of_their_field():
    config = RunConfig(
        learning_rate=1, train_steps=np.int64(5), workdir=pathlib.Path("a/b"),
        loss_scale=np.float32(8), jit_compile=True,
    )  # fmt: skip
    assert type(config.learning_rate) is float and type(config.train_steps) is int
    assert config.workdir == "a/b" and config.loss_scale == 8.0
    assert config.jit_compile is True


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("train_steps", "none", None),
        ("train_steps", "12", 12),
        ("learning_rate", "1e-3", 1e-3),
        ("loss_scale", "none", "none"),
        ("loss_scale", "1024", 1024.0),
        ("jit_compile", "false", False),
        ("jit_compile", "auto", "auto"),
        ("data_dir", "", None),
        ("deterministic", "T", True),
        ("train_steps", "1e3", "1e3"),  # left to the check
    ],
)
def test_reading_a_text(name, text, value):
    assert read(FIELDS[name], text) == value


def test_written_texts_read_back_as_the_same_value():
    config = Config(loss_scale=0.1, jit_compile=False, note="a = b")
    for field in fields_of(Config):
        value = getattr(config, field.name)
        assert read(field, written(value)) == value, field.name


def test_both_lengths_are_an_error_and_a_later_layer_replaces_the_other():
    with pytest.raises(ConfigError, match="`train_steps` .5. and `train_epochs` .20."):
        Config(train_steps=5)
    config = merged(Config, {}, {"train_steps": 5})
    assert (config.train_steps, config.train_epochs) == (5, None)
    config = merged(Config, {"train_steps": 5}, {"train_epochs": 2})
    assert (config.train_steps, config.train_epochs) == (None, 2)
    with pytest.raises(ConfigError, match="say the same thing"):
        merged(Config, {}, {"train_steps": 5, "train_epochs": 2})
    with pytest.raises(ConfigError, match="eval_every_steps"):
        RunConfig(eval_every_steps=1, eval_every_epochs=1)


def test_layers_win_in_order_and_unknown_names_are_refused():
    assert merged(Config, {"hidden": 2, "seed": 1}, {"hidden": 4}).hidden == 4
    with pytest.raises(ConfigError, match="`hiden` is no setting") as caught:
        merged(Config, {"hiden": 2})
    assert "--hidden?" in caught.value.remedy
    with pytest.raises(ConfigError, match="must be even"):
        merged(Config, {"hidden": 3})


@pytest.mark.parametrize(
    "text, expected",
    [
        ("accuracy:5", EarlyStop("accuracy", 5, "max")),
        ("loss:1", EarlyStop("loss", 1, "min")),
        ("fid:3:min", EarlyStop("fid", 3, "min")),
    ],
)
def test_early_stop(text, expected):
    assert parse_early_stop(text) == expected


@pytest.mark.parametrize(
    "text", ["accuracy", "accuracy:", ":5", "accuracy:0", "a:-1", "a:1:up", "a:1:min:2"]
)
def test_a_wrong_early_stop(text):
    with pytest.raises(ConfigError, match=r"`early_stop` .* METRIC:PATIENCE"):
        RunConfig(early_stop=text)


def test_early_stop_needs_evaluations():
    with pytest.raises(ConfigError, match="needs evaluations"):
        RunConfig(early_stop="loss:1", mode="train")


def test_input_and_output_go_with_their_modes():
    for settings in ({"input": "i"}, {"input": "i", "mode": "export"},
                     {"output": "o", "mode": "all"}):  # fmt: skip
        with pytest.raises(ConfigError, match="goes with `mode` predict"):
            RunConfig(**settings)
    assert RunConfig(mode="export", output="o").output == "o"


def test_an_unknown_policy_is_refused_at_once():
    with pytest.raises(ConfigError, match="`policy` .float31."):
        RunConfig(policy="float31")


def test_which_end_of_a_metric_is_better():
    for name in ("loss", "mean_squared_error", "crossentropy", "mae"):
        assert better(name) == "min"
    assert better("accuracy") == better("auc") == "max"


def test_what_changes_the_mathematics():
    def changing(config):
        return {f.name for f in fields_of(type(config)) if config.changes_math(f)}

    assert changing(Config()) == {
        "policy", "loss_scale", "reduce_dtype", "global_batch_size", "seed",
        "optimizer",
        "learning_rate", "lr_schedule", "warmup_steps", "weight_decay", "clip_norm",
        "accumulate_steps", "ema_decay", "hidden",
    }  # fmt: skip
    cosine = changing(Config(lr_schedule="cosine")) - changing(Config())
    assert cosine == {"train_steps", "train_epochs"}


def test_mistakes_in_a_subclass_name_the_remedy():
    class Bare(RunConfig):
        width: int = option(3, "Width.")

    with pytest.raises(ConfigError, match="dataclass decorator") as caught:
        Bare()
    assert "@dataclasses.dataclass(frozen=True)" in caught.value.remedy

    @dataclasses.dataclass(frozen=True)
    class Helpless(RunConfig):
        width: int = 3

    with pytest.raises(ConfigError, match="Helpless.width` must be an option"):
        Helpless()

    @dataclasses.dataclass(frozen=True)
    class Listed(RunConfig):
        widths: tuple = option((3,), "Widths.")

    with pytest.raises(ConfigError, match="of type bool, int, float, str"):
        Listed()
