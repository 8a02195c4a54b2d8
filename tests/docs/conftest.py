"""One run of the program that docs/first_run.md and docs/file_formats.md tell of."""

import pages
import pytest


@pytest.fixture(scope="session")
def first_run(tmp_path_factory):
    """The folder it was started in, and the ended process; cut down to two epochs."""
    folder = tmp_path_factory.mktemp("first_run")
    command = next(c for c in pages.commands("first_run.md") if "--mode=all" in c)
    words = command.removeprefix(".venv/bin/python ").split()
    ended = pages.started([*words, "--train_epochs=2"], folder)
    assert ended.returncode == 0, ended.stderr
    return folder, ended
