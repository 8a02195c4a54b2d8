"""What docs/tfrecords.md gives to paste writes shards and trains on them."""

import json
import re

import numpy as np
import pages
import pytest
import tensorflow as tf

import mpl

PAGE = "tfrecords.md"
SIZES = {"train": 320, "validation": 40, "test": 40}


def series(count, seed):
    random = np.random.default_rng(seed)
    label = random.integers(0, 2, count)
    start = random.uniform(0, 6, [count, 1])
    wave = np.sin(start + np.linspace(0, 6, 32) * (1 + 2 * label[:, None]))
    return wave.astype(np.float32), label


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The names of the page, in a folder with data/ of 4 files a split."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    names = pages.names_of(PAGE)
    for split, count in SIZES.items():
        names["write"]("data", split, *series(count, len(split)), shards=4)
    return names


def test_shards_hold_all_examples_shuffled(page, tmp_path):
    counts = json.loads((tmp_path / "data" / "train.json").read_text())
    assert counts == {f"data/train-0000{n}-of-00004.tfrecord": 80 for n in range(4)}
    waves, label = series(320, len("train"))
    read = [example for path in counts for example in page["read"](path)]
    found = np.stack([example["series"] for example in read])
    order = [int(np.flatnonzero((waves == wave).all(-1))[0]) for wave in found]
    assert sorted(order) == list(range(320)) and order != sorted(order)
    assert [int(example["label"]) for example in read] == label[order].tolist()


@pytest.mark.slow
def test_the_commands(page, tmp_path):
    first, second = pages.commands(PAGE)
    settings = ("--policy=float32", "--learning_rate=0.01", "--global_batch_size=32")
    results = pages.typed(first, page["Series"], *settings)
    assert results["test"]["accuracy"] > 0.9
    damaged = tmp_path / "data" / "train-00001-of-00004.tfrecord"
    content = bytearray(damaged.read_bytes())
    content[20] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(SystemExit) as caught:
        pages.typed(first, page["Series"], *settings, "--workdir=runs/a")
    assert caught.value.code == 1
    pages.typed(second, page["Series"], *settings, "--workdir=runs/b", "--mode=train")
    flags = (tmp_path / "runs" / "b" / "flagfile.txt").read_text()
    assert "# training examples: 319\n" in flags


@pytest.mark.slow
def test_counts_are_checked_when_files_are_read(page, tmp_path):
    source = page["Counted"]().build_data("train", mpl.DataContext("data", 64, 0, None))
    assert source.examples_per_file == [80] * 4
    path = tmp_path / "data" / "test.json"
    path.write_text(path.read_text().replace("10", "11", 1))
    settings = dict(data_dir="data", train_steps=1, policy="float32",
                    summary_every_steps=0, workdir=str(tmp_path / "run"))
    said = r"data/test-00000.*must hold\W+11\W+examples.*holds\W+fewer"
    with pytest.raises(tf.errors.InvalidArgumentError, match=said):
        mpl.run(page["Counted"], **settings)


def test_the_table_of_streams(tmp_path):
    table = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \|$", pages.text_of(PAGE), re.M)
    assert len(table) == 4

    def read(path):
        return tf.data.Dataset.from_tensors({"x": 0})

    for size, count, streams in (map(int, row) for row in table):
        paths = [tmp_path / str(number) for number in range(count)]
        for path in paths:
            path.touch()
        source = mpl.FileSource(paths, read, examples_per_file=[1] * count)
        assert source.num_streams(size) == streams
