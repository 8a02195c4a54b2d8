"""Reads sets that TensorFlow Datasets has prepared."""

import sys

import numpy as np
import pytest
import tfds_files

import mpl
from experiments.datasets import tfds_folder

RANDOM = np.random.RandomState(0)
IMAGES = RANDOM.randint(0, 256, (12, 5, 4, 3), np.uint8)
LABELS = RANDOM.randint(0, 10, 12)


@pytest.fixture
def folder(tmp_path):
    return tfds_files.write(
        tmp_path, "cifar10", "3.0.2",
        {"train": (IMAGES[:8], LABELS[:8]), "test": (IMAGES[8:], LABELS[8:])})


def test_it_returns_what_was_written_in_its_order(folder):
    arrays = tfds_folder.load(str(folder), "train")
    assert sorted(arrays) == ["image", "label"]
    assert arrays["image"].dtype == np.uint8 and arrays["label"].dtype == np.int64
    np.testing.assert_array_equal(arrays["image"], IMAGES[:8])
    np.testing.assert_array_equal(arrays["label"], LABELS[:8])
    np.testing.assert_array_equal(
        tfds_folder.load(str(folder), "test")["image"], IMAGES[8:])


def test_it_is_found_by_name_from_each_folder_above(folder):
    for above in (folder, folder.parent, folder.parent.parent):
        assert tfds_folder.find(str(above), "cifar10") == str(folder)
        assert tfds_folder.find(str(above), "mnist") is None


def test_two_versions_must_be_told_apart(folder):
    newer = tfds_files.write(
        folder.parent.parent, "cifar10", "4.0.0", {"train": (IMAGES, LABELS)})
    with pytest.raises(mpl.ConfigError, match="holds cifar10 more than once") as error:
        tfds_folder.find(str(folder.parent), "cifar10")
    assert f"--data_dir={newer}" in str(error.value)


def test_a_damaged_description_is_named(folder):
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(mpl.ConfigError, match=r"dataset_info\.json is damaged"):
        tfds_folder.find(str(folder), "cifar10")


def test_a_split_that_is_not_there(folder):
    with pytest.raises(mpl.ConfigError, match="it has the splits train, test"):
        tfds_folder.load(str(folder), "validation")


@pytest.mark.parametrize("damage", ["in a record", "between records", "no file"])
def test_a_damaged_file_is_an_error(damage, folder):
    file = folder / "cifar10-train.tfrecord-00000-of-00001"
    content = file.read_bytes()
    if damage == "no file":
        file.unlink()
    elif damage == "in a record":
        file.write_bytes(content[:-7])
    else:
        size = int.from_bytes(content[:8], "little") + 16
        file.write_bytes(content[:size])
    with pytest.raises(mpl.ConfigError, match=r"The split train of .* cannot be read"):
        tfds_folder.load(str(folder), "train")


def test_without_the_extra_the_error_says_how_to_get_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(mpl.ConfigError, match=r"pip install -e '\.\[tfds\]'"):
        tfds_folder.load(str(folder), "train")
