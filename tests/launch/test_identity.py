"""What processes of a cluster compare: settings of the run, and code as it is."""

import importlib
import sys

import pytest

import mpl
from mpl.launch.identity import identity_of

SOURCE = "# caf\u00e9\nimport mpl, helper_of_train\nclass Train(mpl.Experiment): ...\n"


@pytest.fixture
def train(tmp_path, monkeypatch):
    """A module without a package, not in UTF-8, with another one beside it."""
    source = f"# coding: latin-1\n{SOURCE}"
    (tmp_path / "train_alone.py").write_text(source, encoding="latin-1")
    (tmp_path / "helper_of_train.py").write_text("WIDTH = 3\n")
    (tmp_path / "not_imported.py").write_text("WIDTH = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("train_alone").Train
    for name in ("train_alone", "helper_of_train"):
        del sys.modules[name]


def test_code_is_what_is_imported_of_the_folder(train, tmp_path):
    def code():
        return identity_of(train, mpl.RunConfig())["code of the experiment"]

    before = code()
    (tmp_path / "not_imported.py").write_text("WIDTH = 4\n")
    assert code() == before
    (tmp_path / "helper_of_train.py").write_text("WIDTH = 4\n")
    assert code() != before


def test_settings_of_one_host_are_left_out(train):
    def facts(**settings):
        return identity_of(train, mpl.RunConfig(workdir="runs/a", **settings))

    same = facts(data_dir="/local/data", visible_devices="0", cluster_timeout=9)
    assert same == facts()
    changed = facts(seed=1)
    assert {name for name in changed if changed[name] != same[name]} == {"--seed"}


def test_the_record_of_the_run_counts(train):
    config = mpl.RunConfig(workdir="gs://bucket/run")
    facts = [identity_of(train, config, record)
             for record in (None, {"seed": "0"}, {"seed": "1"})]
    assert len({each["flags in the workdir"] for each in facts}) == 3
    assert {each["--workdir"] for each in facts} == {"gs://bucket/run"}
