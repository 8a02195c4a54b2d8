"""What docs/data.md gives to paste runs, and does what it says."""

import re

import pages
import pytest

import mpl
from mpl.launch.config import RunConfig


@pytest.fixture(scope="module")
def page():
    return pages.names_of("data.md")


def _run(experiment, folder, **settings):
    return mpl.run(
        experiment, workdir=str(folder), policy="float32", global_batch_size=20,
        summary_every_steps=0, learning_rate=0.01, **settings)


@pytest.mark.slow
def test_arrays_and_files(page, tmp_path, capsys):
    arrays = _run(page["Squares"], tmp_path / "arrays", train_epochs=3)
    assert arrays["test"]["accuracy"] > 0.9
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "validation", "test"):
        examples = page["Squares"]().build_data(split, None)
        for part in range(4):
            of_file = {name: array[part::4] for name, array in examples.items()}
            page["write"](f"{data}/{split}-{part}.tfrecord", of_file)
    settings = {"data_dir": str(data), "mode": "train", "train_epochs": 1}
    for damaged in range(3):
        path = data / f"train-{damaged}.tfrecord"
        content = bytearray(path.read_bytes())
        content[10 * damaged * len(content) // 50 + 20] ^= 1  # of 50 records
        path.write_bytes(content)
    with pytest.raises(mpl.ConfigError, match="^Split train: File .* after 0 "):
        _run(page["FromFiles"], tmp_path / "files", **settings)
    _run(page["FromFiles"], tmp_path / "files", max_bad_records=3, **settings)
    flagfile = (tmp_path / "files" / "flagfile.txt").read_text()
    assert "# training examples: 197\n" in flagfile
    assert "Goodput " in capsys.readouterr().out


def test_what_the_page_names_exists():
    for name in re.findall(r"`mpl\.(\w+)", pages.text_of("data.md")):
        assert hasattr(mpl, name), name
    flags = set(re.findall(r"--(\w+)=", pages.text_of("data.md")))
    assert flags == {"data_dir", "max_bad_records"}
    assert all(hasattr(RunConfig, flag) for flag in flags)
