"""What docs/image_folder.md gives to paste learns from JPEGs and predicts others."""

import os

import numpy as np
import pages
import pytest
import tensorflow as tf

import mpl
from mpl import data
from mpl.launch import predictions

PAGE = "image_folder.md"
COLOURS = {"blue": [40, 40, 200], "red": [200, 40, 40]}


def picture(colour, number, size=(48, 40)):
    random = np.random.default_rng(number)
    noise = random.integers(-30, 30, [*size, 3])
    return (np.array(COLOURS[colour]) + noise).astype(np.uint8)


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The names of the page, in a folder with photos/ and new/."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("new")
    for colour in COLOURS:
        os.makedirs(f"photos/{colour}")
        for number in range(40):
            content = tf.io.encode_jpeg(picture(colour, number))
            tf.io.write_file(f"photos/{colour}/{number}.jpg", content)
        content = tf.io.encode_png(picture(colour, 99, (30, 90)))
        tf.io.write_file(f"new/{colour}.png", content)
    return pages.names_of(PAGE, 0, 3)


def batch_of(page):
    paths, label, _ = page["listed"]("photos", "train")
    return {"path": tf.constant(paths[:6]), "label": tf.constant(label[:6])}


@pytest.mark.slow
def test_the_commands(page, capsys):
    train, predict = pages.commands(PAGE)
    train = train.replace("--train_epochs=20", "--train_epochs=3")
    results = pages.typed(
        train, page["Photos"], "--policy=float32", "--global_batch_size=16",
        "--learning_rate=0.01")
    assert results["test"]["accuracy"] == 1
    pages.typed(predict, page["Photos"])
    capsys.readouterr()
    exec(pages.blocks(PAGE, "python")[1], page)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines] == [
        ["new/blue.png", "blue"], ["new/red.png", "red"]]
    assert all(0.5 < float(line[2]) <= 1 for line in lines)


def test_a_part_follows_from_the_name(page):
    parts = {split: page["listed"]("photos", split)
             for split in ("train", "validation", "test")}
    names = [{os.path.basename(path) for path in paths}
             for paths, _, _ in parts.values()]
    assert len(set.union(*names)) == sum(map(len, names)) == 40
    assert min(map(len, names)) > 0
    for paths, label, classes in parts.values():
        assert classes.tolist() == ["blue", "red"]
        assert [classes[i] for i in label] == [path.split("/")[1] for path in paths]


def test_a_crop_follows_from_the_seed(page):
    batch = batch_of(page)
    first, again, other = (
        page["augmented"](batch, seed)["image"].numpy()
        for seed in ([1, 2], [1, 2], [1, 3]))
    assert first.shape == (6, 64, 64, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert (first != other).any(axis=(1, 2, 3)).all()
    assert len({image.tobytes() for image in first}) == 6


def test_the_whole_image_is_what_predictions_see(page):
    batch = batch_of(page)
    seen = page["whole"](batch, None)["image"].numpy()
    for path, image in zip(batch["path"].numpy(), seen):
        read = predictions._pixels(path.decode(), 64, 64, 3)
        np.testing.assert_array_equal(read, image)


def test_damaged_images_are_named(page):
    with open("photos/blue/5.jpg", "r+b") as file:
        file.truncate(100)
    names = dict(page, print=lambda *_: None)
    exec(pages.blocks(PAGE, "python")[2], names)
    assert names["damaged"](tf.io.gfile.glob("photos/*/*.jpg")) == ["photos/blue/5.jpg"]


@pytest.mark.slow
def test_files_learn_as_well(page):
    results = mpl.run(
        page["FromFiles"], workdir="runs/files", data_dir="photos", train_epochs=3,
        policy="float32", global_batch_size=16, learning_rate=0.01)
    assert results["test"]["accuracy"] == 1
    _, label, _ = page["listed"]("photos", "validation")
    source = page["FromFiles"]().build_data("validation", mpl.DataContext(
        "photos", 16, 0, None))
    pipeline = data.Pipeline(source, global_batch_size=1, shuffle=False, repeat=False)
    assert [int(batch["label"][0]) for batch in pipeline.dataset()] == label.tolist()
