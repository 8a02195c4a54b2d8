"""MNIST in its real layouts, and what is wrong with damaged files."""

import gzip
import struct

import numpy as np
import pytest

import mpl
from experiments.datasets import digits, mnist

PARTS = {"train": ("train", 36), "test": ("t10k", 10)}


def examples(part):
    """Returns images and labels of a part, other ones for each image."""
    count = PARTS[part][1]
    random = np.random.default_rng(count)
    return (random.integers(0, 256, (count, 28, 28), np.uint8),
            (np.arange(count) % 10).astype(np.uint8))


def idx(array):
    """Returns the bytes of an IDX file: 0, 0, 8 for bytes, the dimensions, sizes."""
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
    return header + array.tobytes()


def write_idx(folder, ending=""):
    folder.mkdir(exist_ok=True)
    pack = gzip.compress if ending else bytes
    for part, (prefix, _) in PARTS.items():
        image, label = examples(part)
        for name, array in (("images-idx3", image), ("labels-idx1", label)):
            path = folder / f"{prefix}-{name}-ubyte{ending}"
            path.write_bytes(pack(idx(array)))
    return folder


def write_npz(folder, **changes):
    folder.mkdir(exist_ok=True)
    arrays = {}
    for part in PARTS:
        arrays[f"x_{part}"], arrays[f"y_{part}"] = examples(part)
    arrays |= changes
    np.savez(folder / "mnist.npz", **{n: a for n, a in arrays.items() if a is not None})
    return folder


@pytest.fixture
def folder(tmp_path):
    """The four files, plain."""
    return write_idx(tmp_path / "mnist")


@pytest.mark.parametrize("write", [
    write_idx, lambda folder: write_idx(folder, ".gz"), write_npz])
def test_each_layout(write, tmp_path):
    folder = str(write(tmp_path / "data"))
    image, label = examples("train")
    for split, part in (("train", slice(0, 33)), ("validation", slice(33, 36))):
        got = mnist.load(split, folder)
        np.testing.assert_array_equal(got["image"], image[part, :, :, np.newaxis])
        np.testing.assert_array_equal(got["label"], label[part])
        assert got["image"].dtype == np.uint8 and got["label"].dtype == np.int32
    got = mnist.load("test", folder)
    np.testing.assert_array_equal(got["image"][..., 0], examples("test")[0])
    np.testing.assert_array_equal(got["label"], range(10))


def test_the_bytes_by_hand(folder):
    """Magic number, 36, 28, 28; then row by row: record 1, row 2, column 3."""
    content = (folder / "train-images-idx3-ubyte").read_bytes()
    assert content[:8] == b"\x00\x00\x08\x03\x00\x00\x00\x24"
    assert content[8:16] == b"\x00\x00\x00\x1c\x00\x00\x00\x1c"
    got = mnist.load("train", str(folder))["image"]
    assert got[1, 2, 3, 0] == content[16 + 784 + 2 * 28 + 3]


def test_files_that_came_first_are_read(folder):
    write_npz(folder, x_test=None)
    assert len(mnist.load("test", str(folder))["label"]) == 10


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize("name, change, message", [
    (IMAGES, lambda c: c[:5000],
     r"train-images-idx3-ubyte ends at byte 5000, and must end at byte 28240 by its "
     r"header: \[36, 28, 28\] bytes from byte 16 on.\nCopy or download"),
    (IMAGES, lambda c: c + b"0", "ends at byte 28241, and must end at byte 28240"),
    (IMAGES, lambda c: c[:10], "ends at byte 10, and must end at byte 16"),
    (IMAGES, lambda c: b"", r"begins with 0 \(byte 0\), and must .* number 2051"),
    (IMAGES, lambda c: idx(examples("train")[1]), "begins with 2049 .* number 2051"),
    (IMAGES, lambda c: idx(np.zeros((36, 32, 32), np.uint8)),
     r"images of \(32, 32\), and must hold images of \(28, 28\)"),
    (LABELS, lambda c: c[:-3], "ends at byte 41, and must end at byte 44"),
    (LABELS, lambda c: c[:15] + b"\x0b" + c[16:],
     r"labels-idx1-ubyte has the label 11 in record 7, and must have labels of 0 to 9"),
    (LABELS, lambda c: idx(np.zeros(35, np.uint8)), "36 images and 35 labels of train"),
    (LABELS, None, "holds neither train-images-idx3-ubyte and train-labels.*\nPut"),
])
def test_damaged_idx_files(folder, name, change, message):
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if change:
        path.write_bytes(change(content))
    with pytest.raises(mpl.ConfigError, match=message):
        mnist.load("train", str(folder))
    assert len(mnist.load("test", str(folder))["label"]) == 10


@pytest.mark.parametrize("change", [
    lambda content: content[:len(content) // 2],
    lambda content: b"no gzip",
    lambda content: content[:50] + bytes(50) + content[100:]])
def test_damaged_gzip_files(tmp_path, change):
    folder = write_idx(tmp_path / "gz", ".gz")
    path = folder / f"{IMAGES}.gz"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(mpl.ConfigError, match="ubyte.gz cannot be uncompressed: .+\nC"):
        mnist.load("validation", str(folder))


@pytest.mark.parametrize("changes, message", [
    ({"y_train": None}, "x_train and y_train of .*mnist.npz cannot be read"),
    ({"x_train": np.zeros((36, 28, 28), np.float32)},
     r"x_train of .* is float32 \[36, 28, 28\], and must be uint8 \[n, 28, 28\]"),
    ({"y_train": np.zeros((36, 1), np.uint8)}, r"y_train .*, and must be uint8 \[n\]"),
    ({"y_train": np.full(36, 10, np.uint8)}, "y_train of .*npz has the label 10 in"),
    ({"y_train": np.array([{}] * 36)}, "x_train and y_train of .* cannot be read"),
])
def test_damaged_arrays(tmp_path, changes, message):
    folder = write_npz(tmp_path / "npz", **changes)
    with pytest.raises(mpl.ConfigError, match=message):
        mnist.load("train", str(folder))


def test_a_truncated_npz(tmp_path):
    path = write_npz(tmp_path / "npz") / "mnist.npz"
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(mpl.ConfigError, match="mnist.npz cannot be read: "):
        mnist.load("test", str(path.parent))


def test_digits_stand_in_and_say_so(capsys):
    mnist.load("train", None)
    got = mnist.load("validation", None)
    said = capsys.readouterr().out
    assert said.count("embedded digits of 8×8, enlarged to 28×28") == 1
    small = digits.load("validation")
    np.testing.assert_array_equal(got["label"], small["label"])
    assert got["image"].shape == (180, 28, 28, 1) and got["image"].dtype == np.uint8
    # Each pixel is a square of 3 × 3 within a border of 2; ink of 16 is white.
    inner = got["image"][:, 2:-2, 2:-2]
    for row in range(3):
        for column in range(3):
            np.testing.assert_array_equal(
                inner[:, row::3, column::3], np.round(small["image"] * (255 / 16)))
    assert got["image"].max() == 255
    assert got["image"].sum() == inner.sum(dtype=np.uint64)
