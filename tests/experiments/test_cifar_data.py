"""CIFAR's binary files, what is wrong with damaged ones, and random crops."""

import numpy as np
import pytest
import tensorflow as tf
import tfds_files

import mpl
from experiments.datasets import cifar, digits
from experiments.datasets.crops import crop_and_mirror

FOLDERS = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}
FILES = {"cifar10": [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"],
         "cifar100": ["train.bin", "test.bin"]}


def records(number, count, name="cifar10"):
    """Returns the bytes of a file: label bytes, then the planes red, green, blue."""
    random = np.random.default_rng(number)
    planes = random.integers(0, 256, (count, 3072), np.uint8)
    label = (np.arange(count) + number) % 10
    labels = [label] if name == "cifar10" else [label, 10 * label + number]
    return np.concatenate(
        [np.array(labels, np.uint8).T, planes], 1)


def write(folder, monkeypatch, name="cifar10", count=8):
    """Writes files of so many records each, which from now on is the full number."""
    for part in ("train", "test"):
        files = len(getattr(cifar.SETS[name], part))
        monkeypatch.setitem(cifar.NUM_IMAGES, part, count * files)
    (folder / FOLDERS[name]).mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(FILES[name]):
        path = folder / FOLDERS[name] / file
        path.write_bytes(records(number, count, name).tobytes())
    return str(folder)


def test_cifar10(tmp_path, monkeypatch):
    folder = write(tmp_path, monkeypatch)
    train, validation, test = (
        cifar.load(split, folder) for split in ("train", "validation", "test"))
    assert [len(part["label"]) for part in (train, validation, test)] == [36, 4, 8]
    every = np.concatenate([records(number, 8) for number in range(5)])
    for part, rows in ((train, every[:36]), (validation, every[36:]),
                       (test, records(5, 8))):
        np.testing.assert_array_equal(part["label"], rows[:, 0])
        assert part["image"].shape[1:] == (32, 32, 3)
        assert part["image"].dtype == np.uint8 and part["label"].dtype == np.int32
        # Channel c at row y, column x is byte 1 + 1024 c + 32 y + x.
        for c, y, x in ((0, 0, 0), (0, 0, 31), (1, 2, 3), (2, 31, 0), (2, 31, 31)):
            np.testing.assert_array_equal(
                part["image"][:, y, x, c], rows[:, 1 + 1024 * c + 32 * y + x])


def test_all_training_images(tmp_path, monkeypatch):
    folder = write(tmp_path, monkeypatch)
    assert cifar.load("validation", folder, holds_out=False) is None
    assert len(cifar.load("train", folder, holds_out=False)["label"]) == 40


def test_cifar100_learns_the_fine_label(tmp_path, monkeypatch):
    folder = write(tmp_path, monkeypatch, "cifar100", 20)
    got = cifar.load("test", folder, "cifar100")
    rows = records(1, 20, "cifar100")
    np.testing.assert_array_equal(got["label"], rows[:, 1])
    np.testing.assert_array_equal(got["image"][:, 4, 5, 1], rows[:, 2 + 1024 + 133])
    assert cifar.SETS["cifar100"].num_classes == 100
    assert len(cifar.load("validation", folder, "cifar100")["label"]) == 2


def test_the_files_may_lie_in_the_folder_itself(tmp_path, monkeypatch):
    folder = write(tmp_path, monkeypatch)
    here = cifar.load("test", f"{folder}/cifar-10-batches-bin")
    np.testing.assert_array_equal(here["label"], cifar.load("test", folder)["label"])


@pytest.mark.parametrize("name, file, number", [
    ("cifar10", "data_batch_4.bin", 10_000), ("cifar10", "test_batch.bin", 10_000),
    ("cifar100", "train.bin", 50_000), ("cifar100", "test.bin", 10_000)])
def test_a_file_cut_between_records(tmp_path, monkeypatch, name, file, number):
    full = dict(cifar.NUM_IMAGES)
    folder = write(tmp_path, monkeypatch, name)
    split = "test" if "test" in file else "train"
    path = tmp_path / FOLDERS[name] / file
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 8 * 7])
    with pytest.raises(mpl.ConfigError) as error:
        cifar.load(split, folder, name)
    assert str(error.value) == (
        f"{path} holds 7 images, and that file of {name} holds 8.\n"
        "Copy or download it again, in the binary version.")
    assert len(cifar.read(str(path), name)[1]) == 7  # as --input
    path.write_bytes(content)
    for part, count in full.items():  # those of the set itself
        monkeypatch.setitem(cifar.NUM_IMAGES, part, count)
    with pytest.raises(mpl.ConfigError, match=f"holds 8 images, .* holds {number:,}"):
        cifar.load(split, folder, name)


def test_its_own_files_come_first_as_of_mnist(tmp_path, monkeypatch):
    other = np.zeros((10, 32, 32, 3), np.uint8), np.zeros(10, np.int32)
    tfds_files.write(tmp_path, "cifar10", "3.0.2", {"train": other, "test": other})
    folder = write(tmp_path, monkeypatch)
    np.testing.assert_array_equal(
        cifar.load("test", folder)["label"], records(5, 8)[:, 0])
    (tmp_path / FOLDERS["cifar10"] / "test_batch.bin").unlink()
    assert len(cifar.load("test", folder)["label"]) == 10


@pytest.mark.parametrize("name, file, change, message", [
    ("cifar10", "data_batch_3.bin", lambda c: c[:-1000],
     r"data_batch_3.bin ends within record 7, 2073 bytes after byte 21511; a record of "
     r"cifar10 has 3073 bytes\.\nCopy or download it again, in the binary version"),
    ("cifar10", "data_batch_3.bin", lambda c: b"", "within record 0, 0 bytes after by"),
    ("cifar10", "data_batch_5.bin", lambda c: c[:3073] + b"\x0a" + c[3074:],
     r"data_batch_5.bin has the label 10 in record 1 \(byte 3073\), and .* 0 to 9"),
    ("cifar10", "data_batch_2.bin", None, r"lacks data_batch_2.bin, in itself or in "
     r"cifar-10-batches-bin\.\nUnpack the binary"),
    ("cifar100", "train.bin", lambda c: b"\x14" + c[1:],
     r"coarse label 20 in record 0 \(byte 0\), and must have 0 to 19"),
    ("cifar100", "train.bin", lambda c: c[:1] + b"\x64" + c[2:],
     r"fine label 100 in record 0 \(byte 1\), and must have 0 to 99"),
    ("cifar100", "train.bin", lambda c: c + b"1",
     "within record 8, 1 bytes after byte 24592; a record of cifar100 has 3074 bytes"),
])
def test_damaged_files(tmp_path, monkeypatch, name, file, change, message):
    folder = write(tmp_path, monkeypatch, name)
    path = tmp_path / FOLDERS[name] / file
    content = path.read_bytes()
    path.unlink()
    if change:
        path.write_bytes(change(content))
    with pytest.raises(mpl.ConfigError, match=message):
        cifar.load("train", folder, name)
    assert len(cifar.load("test", folder, name)["label"]) == 8


def test_digits_stand_in_and_say_so(capsys):
    cifar.load("train", None)
    got = cifar.load("test", None)
    said = capsys.readouterr().out
    assert said.count("embedded digits of 8×8, enlarged to 32×32") == 1
    small = digits.load("test")
    assert got["image"].shape == (360, 32, 32, 3)
    for channel in range(3):
        np.testing.assert_array_equal(
            got["image"][:, 2::4, 3::4, channel],
            np.round(small["image"][..., 0] * (255 / 16)))
    np.testing.assert_array_equal(got["label"], small["label"])


@pytest.mark.parametrize("settings", [{"name": "cifar100"}, {"holds_out": False}])
def test_digits_do_not_stand_in_for_what_they_are_not(settings):
    with pytest.raises(mpl.ConfigError, match="and `data_dir` is not set.\nSet --data"):
        cifar.load("train", None, **settings)


@pytest.mark.parametrize("mirrors, grey", [(True, 0), (False, 0), (True, 120)])
def test_crops_by_numpy(mirrors, grey):
    images = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), np.uint8)
    seed = tf.constant([3, 4])
    got = crop_and_mirror({"image": tf.constant(images), "label": 7}, seed,
                          mirrors=mirrors, grey=grey)
    assert got["label"] == 7 and got["image"].dtype == tf.uint8
    random = tf.random.stateless_uniform([64, 3, 1], seed).numpy()[..., 0]
    offsets, mirrored = set(), 0
    for image, result, (row, column, side) in zip(images, got["image"], random):
        around = np.pad(image, [(4, 4), (4, 4), (0, 0)], constant_values=grey)
        row, column = int(row * 9), int(column * 9)
        part = around[row:row + 32, column:column + 32]
        if mirrors and side < 0.5:
            part, mirrored = part[:, ::-1], mirrored + 1
        np.testing.assert_array_equal(result, part)
        offsets |= {row, column}
    assert offsets == set(range(9))
    assert 20 < mirrored < 44 if mirrors else mirrored == 0
