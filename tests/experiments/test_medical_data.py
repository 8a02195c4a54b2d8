"""Labels and what they ask for, MedMNIST's files, tumours, synthetic lesions."""

import io
import sys

import numpy as np
import pytest

import mpl
from experiments.datasets import breast_cancer, diagnosis, lesions, medmnist


def column(*labels):
    return np.array(labels, np.uint8)[:, np.newaxis]


MULTI = np.array([[0, 1, 1], [0, 0, 0], [1, 1, 0], [0, 1, 0]], np.uint8)


@pytest.mark.parametrize("label, task, expected", [
    (column(0, 1, 1), "auto", ("binary", 1)),
    (column(0, 2, 1), "auto", ("multi_class", 3)),
    (MULTI, "auto", ("multi_label", 3)),
    (column(0, 1, 1), "multi_class", ("multi_class", 2)),
    (column(0, 1, 1), "multi_label", ("multi_label", 1)),
])
def test_the_task_is_found_from_the_labels(label, task, expected):
    assert diagnosis.task_of(label, task, "a.npz") == expected


@pytest.mark.parametrize("label, task, message", [
    (column(0, 2, 1), "binary",
     r"`task` \(binary\) does not go with the labels of a.npz: 1 a record, from 0 to 2."
     "\nUse --task=multi_class."),
    (MULTI, "multi_class", "3 a record, from 0 to 1.\nUse --task=multi_label."),
    (column(0, 1, 9, 2), "auto", "a.npz: record 2 has label 9, and no record label 3."),
    (np.array([[0], [2**40], [1], [3]]), "auto",
     f"record 1 has label {2**40}, and no record label 2."),
])
def test_labels_of_another_task_are_refused(label, task, message):
    with pytest.raises(mpl.ConfigError, match=message):
        diagnosis.task_of(label, task, "a.npz")


def test_labels_are_encoded_by_hand():
    np.testing.assert_array_equal(
        diagnosis.encoded(column(0, 2, 1), "multi_class", 3, ""),
        [[1, 0, 0], [0, 0, 1], [0, 1, 0]])
    binary = diagnosis.encoded(column(0, 1, 1), "binary", 1, "")
    assert binary.tolist() == [[0], [1], [1]] and binary.dtype == np.uint8
    np.testing.assert_array_equal(diagnosis.encoded(MULTI, "multi_label", 3, ""), MULTI)


@pytest.mark.parametrize("label, task, logits, message", [
    (column(0, 3), "multi_class", 3, "record 1 has label 3, and must have 0 ... 2."),
    (np.array([[0], [1], [-1]]), "multi_class", 2, "record 2 has label -1, and"),
    (column(0, 1, 2), "binary", 1, "record 2 has label 2, and must have 0 ... 1."),
    (MULTI + MULTI, "multi_label", 3, "record 0 has label 2, and must have 0 ... 1."),
    (MULTI, "multi_label", 14, "the labels are 3 a record, and 14 in the training"),
    (MULTI, "binary", 1, "the labels are 3 a record, and 1 in the training"),
])
def test_a_label_out_of_range_is_named(label, task, logits, message):
    with pytest.raises(mpl.ConfigError, match=f"x.npz: {message}"):
        diagnosis.encoded(label, task, logits, "x.npz")


def test_balanced_weights_by_hand():
    weights = diagnosis.balanced_weights(column(0, 0, 0, 1), "binary")
    np.testing.assert_allclose(weights, [[4 / (2 * 3)], [4 / (2 * 1)]])
    one_hot = diagnosis.encoded(column(0, 0, 1, 2), "multi_class", 3, "")
    np.testing.assert_allclose(
        diagnosis.balanced_weights(one_hot, "multi_class")[1],
        [4 / (3 * 2), 4 / (3 * 1), 4 / (3 * 1)])
    weights = diagnosis.balanced_weights(MULTI, "multi_label")
    np.testing.assert_allclose(weights[:, 0], [4 / (2 * 3), 4 / (2 * 1)])
    np.testing.assert_allclose(weights[:, 1], [4 / (2 * 1), 4 / (2 * 3)])
    assert weights.dtype == np.float32


def arrays(shape=(28, 28), labels=1, count=6):
    """Returns the arrays of a MedMNIST file, with numbers that tell them apart."""
    made = {}
    for number, split in enumerate(("train", "val", "test")):
        image = np.full((count, *shape), 10 * number, np.uint8)
        image += np.arange(count, dtype=np.uint8).reshape([-1, *[1] * len(shape)])
        label = (np.arange(count * labels).reshape([count, labels]) + number) % 2
        made |= {f"{split}_images": image, f"{split}_labels": label.astype(np.uint8)}
    return made


def content(**changes):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{**arrays(), **changes})
    return buffer.getvalue()


@pytest.mark.parametrize("shape, labels, expected", [
    ((28, 28), 1, (28, 28, 1)), ((28, 28, 3), 1, (28, 28, 3)),
    ((28, 28, 28), 1, (28, 28, 28, 1)), ((64, 64), 14, (64, 64, 1))])
def test_medmnist_is_read(shape, labels, expected, tmp_path):
    np.savez(tmp_path / "pathmnist.npz", **arrays(shape, labels))
    path = medmnist.find(str(tmp_path), None)
    assert path == str(tmp_path / "pathmnist.npz")
    for number, split in enumerate(("train", "validation", "test")):
        examples = medmnist.load(path, split)
        assert examples["image"].shape == (6, *expected)
        assert examples["image"].dtype == np.uint8
        pixels = examples["image"].reshape([6, -1])
        assert (pixels.T == 10 * number + np.arange(6)).all()
        assert examples["label"].shape == (6, labels)
        assert examples["label"][1, 0] == (labels + number) % 2


GOOD = content()


@pytest.mark.parametrize("bad, cause", [
    (GOOD[:-300], "must be an .npz file with val_images and val_labels: File is not a"),
    (b"", "must be an .npz file with"),
    (b"\x80\x04" + GOOD[2:], "must be an .npz file with"),
    (content(val_images=np.zeros([3, 28, 28], np.uint8)),
     "holds 3 val_images and 6 val_labels"),
    (content(val_images=np.zeros([6, 28, 28], np.float32)),
     r"val_images is float32 \[6, 28, 28\], and must be uint8"),
    (content(val_images=np.zeros([6, 28, 28, 5], np.uint8)),
     r"val_images is uint8 \[6, 28, 28, 5\], and must be uint8"),
    (content(val_labels=np.zeros([6, 1])), r"val_labels is float64 \[6, 1\], and must"),
    (content(val_labels=np.zeros(6, np.uint8)), r"val_labels is uint8 \[6\], and must"),
    (content(val_labels=np.array([None] * 6)), "must be an .npz file with"),
], ids=["cut", "empty", "magic", "count", "dtype", "shape", "float labels",
        "flat labels", "objects"])
def test_a_bad_file_is_named(bad, cause, tmp_path):
    path = tmp_path / "chestmnist.npz"
    path.write_bytes(bad)
    with pytest.raises(mpl.ConfigError, match=cause) as caught:
        medmnist.load(str(path), "validation")
    assert caught.value.cause.startswith(str(path))
    assert caught.value.remedy == (
        "Get the file anew from https://zenodo.org/records/10519652.")


def test_a_missing_array_and_damaged_bytes_are_named(tmp_path):
    path = tmp_path / "octmnist.npz"
    some = arrays()
    np.savez(path, **{name: some[name] for name in some if name != "test_labels"})
    assert len(medmnist.load(str(path), "train")["label"]) == 6
    with pytest.raises(mpl.ConfigError, match="test_labels is not a file in the arch"):
        medmnist.load(str(path), "test")
    whole = bytearray(GOOD)
    whole[100] ^= 0xFF  # in the first array, the images of training
    path.write_bytes(whole)
    with pytest.raises(mpl.ConfigError, match="must be an .npz file with train_images"):
        medmnist.load(str(path), "train")


def test_the_set_is_named_where_there_are_several(tmp_path):
    with pytest.raises(mpl.ConfigError, match="names an .npz file of `data_dir`, wh"):
        medmnist.find(None, "pathmnist")
    with pytest.raises(mpl.ConfigError, match=r"`dataset` \(none\).*which holds none"):
        medmnist.find(str(tmp_path), None)
    for name in ("b.npz", "a.npz", "c.txt"):
        (tmp_path / name).write_bytes(b"")
    for name in (None, "c"):
        with pytest.raises(mpl.ConfigError, match="which holds a.npz, b.npz"):
            medmnist.find(str(tmp_path), name)
    assert medmnist.find(str(tmp_path), "b") == str(tmp_path / "b.npz")


def test_the_table_of_tumours():
    sklearn = pytest.importorskip("sklearn.datasets")
    parts = {split: breast_cancer.load(split) for split in breast_cancer.SPLITS}
    sizes = {split: len(part["label"]) for split, part in parts.items()}
    assert sizes == {"train": 341, "validation": 114, "test": 114}
    features = np.concatenate([part["features"] for part in parts.values()])
    label = np.concatenate([part["label"] for part in parts.values()])
    assert features.shape == (569, 30) and label.shape == (569, 1)
    assert features.dtype == np.float32 and label.dtype == np.int32
    assert label.sum() == 212  # malignant ones, the smaller part
    table = sklearn.load_breast_cancer()
    order = np.random.RandomState(0).permutation(569)
    np.testing.assert_array_equal(features, table.data[order].astype(np.float32))
    malignant = list(table.target_names).index("malignant")
    np.testing.assert_array_equal(label[:, 0], table.target[order] == malignant)


def test_without_scikit_learn_one_line_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(mpl.ConfigError) as caught:
        breast_cancer.load("train")
    assert str(caught.value) == (
        "`dataset` (breast_cancer) needs scikit-learn, which is not installed.\n"
        "Install the extra: pip install -e '.[medical]'.")


def test_measurements_to_predict_are_read(tmp_path):
    path = tmp_path / "tumours.csv"
    lines = [",".join(map(str, range(n, n + 30))) for n in (0, 5)]
    path.write_text("\n".join(lines))
    features = breast_cancer.read_features(str(path))["features"]
    np.testing.assert_array_equal(features, [range(30), range(5, 35)])
    assert features.dtype == np.float32


@pytest.mark.parametrize("line", ["1,2", "", ",".join("x" * 30), "nan," * 29 + "1"])
def test_bad_measurements_are_named_with_their_line(line, tmp_path):
    path = tmp_path / "tumours.csv"
    path.write_text(",".join("1" * 30) + f"\n{line}\n")
    with pytest.raises(mpl.ConfigError, match=f"{path}: line 2 must hold 30 numbers"):
        breast_cancer.read_features(str(path))


@pytest.mark.parametrize("rank", [2, 3])
def test_synthetic_lesions_have_the_risk_that_is_said(rank):
    split = {2: "train", 3: "test"}[rank]
    examples = lesions.load(split, rank)
    count = lesions.NUM_EXAMPLES[rank][split]
    assert examples["image"].shape == (count, *[28] * rank, 1)
    assert examples["image"].dtype == np.uint8
    np.testing.assert_array_equal(examples["image"], lesions.load(split, rank)["image"])
    r, c = lesions.factors(split, rank)
    for values in (r, c):
        assert abs(values.mean()) < 3 / count**0.5 and abs(values.std() - 1) < 0.1
    # As many are ill as the odds say, among those at high risk and at low.
    risk = 1 / (1 + np.exp(-lesions.log_odds(r, c)))
    label = examples["label"][:, 0]
    for part in (risk < 0.2, (0.2 <= risk) & (risk < 0.6), 0.6 <= risk):
        spread = np.sqrt((risk * (1 - risk))[part].sum())
        assert abs(label[part].sum() - risk[part].sum()) < 3 * spread
    # The brightest pixel is ground and contrast, whose ranges are known.
    brightest = examples["image"].reshape([count, -1]).max(1) / 255
    assert np.corrcoef(brightest, c)[0, 1] > 0.9


def test_the_splits_of_lesions_differ():
    images = [lesions.load(split)["image"][:100] for split in lesions.NUM_EXAMPLES[2]]
    assert all((a != b).any() for a, b in zip(images, images[1:]))
