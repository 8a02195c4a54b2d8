"""Reads sets that TensorFlow Datasets has prepared."""

import json
import sys

import numpy as np
import pytest
import tfds_files

import mpl
from experiments.datasets import cifar, mnist, tfds_folder

RANDOM = np.random.RandomState(0)
IMAGES = RANDOM.randint(0, 256, (12, 5, 4, 3), np.uint8)
LABELS = RANDOM.randint(0, 10, 12)


@pytest.fixture
def folder(tmp_path):
    return tfds_files.write(
        tmp_path, "cifar10", "3.0.2",
        {"train": (IMAGES[:8], LABELS[:8]), "test": (IMAGES[8:], LABELS[8:])})


def load(folder, split, shape=(5, 4, 3), num_classes=10):
    return tfds_folder.load_images(str(folder), split, shape, num_classes)


def test_it_returns_what_was_written_in_its_order(folder):
    image, label = load(folder, "train")
    assert image.dtype == np.uint8 and label.dtype == np.int32
    np.testing.assert_array_equal(image, IMAGES[:8])
    np.testing.assert_array_equal(label, LABELS[:8])
    np.testing.assert_array_equal(load(folder, "test")[0], IMAGES[8:])


def test_it_is_found_by_name_from_each_folder_above(folder):
    for above in (folder, folder.parent, folder.parent.parent):
        assert tfds_folder.find(str(above), "mnist", "cifar10") == str(folder)
        assert tfds_folder.find(str(above), "mnist") is None


def test_two_versions_must_be_told_apart(folder):
    newer = tfds_files.write(
        folder.parent.parent, "cifar10", "4.0.0", {"train": (IMAGES, LABELS)})
    with pytest.raises(mpl.ConfigError, match="holds 2 sets") as error:
        tfds_folder.find(str(folder.parent), "cifar10")
    assert f"--data_dir={newer}" in str(error.value)


def test_a_damaged_description_is_named(folder):
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(mpl.ConfigError, match=r"dataset_info\.json is damaged"):
        tfds_folder.find(str(folder), "cifar10")


def test_a_split_that_is_not_there(folder):
    with pytest.raises(mpl.ConfigError, match="it has the splits train, test"):
        load(folder, "validation")


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
        load(folder, "train")


def test_other_images_and_labels_are_errors(folder):
    with pytest.raises(mpl.ConfigError, match=r"uint8 \[5, 4, 3\], and must "):
        load(folder, "train", shape=(28, 28, 1))
    most = int(LABELS[:8].max())
    record = LABELS[:8].argmax()
    with pytest.raises(mpl.ConfigError, match=f"label {most} in record {record}, and"):
        load(folder, "train", num_classes=most)


def test_a_set_without_labels_is_an_error(folder):
    path = folder / "features.json"
    content = json.loads(path.read_text())
    del content["featuresDict"]["features"]["label"]
    path.write_text(json.dumps(content))
    with pytest.raises(mpl.ConfigError, match="has no label; it has image"):
        load(folder, "train")


def test_without_the_extra_the_error_says_how_to_get_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(mpl.ConfigError, match=r"pip install -e '\.\[tfds\]'"):
        load(folder, "train")


@pytest.mark.parametrize(
    "name, shape, num_classes, reads",
    [("mnist", (28, 28, 1), 10, mnist.load),
     ("fashion_mnist", (28, 28, 1), 10, mnist.load),
     ("cifar10", (32, 32, 3), 10, cifar.load),
     ("cifar100", (32, 32, 3), 100,
      lambda split, folder: cifar.load(split, folder, "cifar100"))])
def test_loaders_take_such_folders(name, shape, num_classes, reads, tmp_path):
    images = RANDOM.randint(0, 256, (30, *shape), np.uint8)
    labels = RANDOM.randint(0, num_classes, 30)
    tfds_files.write(
        tmp_path, name, "1.0.0",
        {"train": (images[:24], labels[:24]), "test": (images[24:], labels[24:])},
        num_classes)
    ends = {"train": (0, 22), "validation": (22, 24),
            "test": (24, 30)}
    for split, (start, end) in ends.items():
        examples = reads(split, str(tmp_path))
        np.testing.assert_array_equal(examples["image"], images[start:end])
        np.testing.assert_array_equal(examples["label"], labels[start:end])
        assert examples["label"].dtype == np.int32
