"""ImageNet's records are read as they lie on disk, cropped, and named where bad."""

import imagenet_records
import numpy as np
import pytest
import tensorflow as tf

import mpl
from experiments.datasets import imagenet, tfrecords
from mpl.data import Pipeline, naming_damage

SIZE = 32


def pipeline(source, batch_size=4, **settings):
    settings = {"shuffle": True, "repeat": True, "seed": 3, **settings}
    return Pipeline(source, global_batch_size=batch_size, **settings)


def once(source, batch_size=4):
    return pipeline(source, batch_size, shuffle=False, repeat=False)


def read(pipeline, count=-1, **where):
    return list(pipeline.dataset(**where).take(count).as_numpy_iterator())


def together(batches, name):
    return np.concatenate([batch[name] for batch in batches])


def test_records_of_the_real_layout_are_read(tmp_path):
    imagenet_records.write_greys(tmp_path, "validation")
    source = imagenet.load("validation", str(tmp_path), SIZE)
    assert source.num_examples == 10 and source.examples_per_file == [5, 5]
    batches = read(once(source))
    real = together(batches, "weight") == 1
    image, label = (together(batches, name)[real] for name in ("image", "label"))
    assert image.shape == (10, SIZE, SIZE, 3) and image.dtype == np.uint8
    assert label.dtype == np.int32
    assert sorted(label) == list(range(10))  # 1 ... 10 in the files
    for picture, number in zip(image, label):
        assert (picture == 10 * (number + 1)).all()


def test_training_and_validation_have_files_of_their_own(tmp_path):
    imagenet_records.write_greys(tmp_path, "train", files=3)
    imagenet_records.write_greys(tmp_path, "validation", files=1)
    assert imagenet.load("train", str(tmp_path), SIZE).num_examples == 15
    assert imagenet.load("validation", str(tmp_path), SIZE).num_examples == 5
    assert imagenet.load("test", str(tmp_path), SIZE) is None


def coordinates(height=256, width=256):
    """Returns a JPEG in which red is the column and green the row."""
    red, green = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack([red, green, 0 * red], -1).astype(np.uint8)
    return tf.io.encode_jpeg(pixels, quality=100, chroma_downsampling=False)


def test_the_middle_is_cut_out():
    """Of 64×96 a square of 64 · 32 ÷ (32 + 32), from row 16 and column 32 on."""
    image = imagenet.middle(coordinates(64, 96), SIZE).numpy()
    whole = tf.io.decode_jpeg(coordinates(64, 96), dct_method="INTEGER_FAST").numpy()
    np.testing.assert_array_equal(image, whole[16:48, 32:64])
    assert abs(int(image[0, 0, 0]) - 32) <= 2 and abs(int(image[0, 0, 1]) - 16) <= 2


def test_a_random_part_has_the_area_and_the_shape_of_the_source():
    picture, mirrored, areas, shapes = coordinates(), [], [], []
    for number in range(200):
        image = imagenet.random_part(picture, SIZE, tf.constant([7, number]))
        assert image.shape == (SIZE, SIZE, 3) and image.dtype == tf.uint8
        across = image[:, -1, 0].numpy().mean() - image[:, 0, 0].numpy().mean()
        down = image[-1, :, 1].numpy().mean() - image[0, :, 1].numpy().mean()
        width, height = (each * SIZE / (SIZE - 1) for each in (abs(across), down))
        assert 0.7 < width / height < 1.43
        areas.append(width * height / 256**2)
        shapes.append(width / height)
        mirrored.append(across < 0)
    assert 0.06 < min(areas) < 0.15 and max(areas) > 0.85
    assert 70 <= sum(mirrored) <= 130
    for of_part in (areas, shapes):  # 0 but for a standard deviation of 0.07
        assert abs(np.corrcoef(of_part, mirrored)[0, 1]) < 0.25


def test_a_seed_is_a_part():
    picture = coordinates()
    first, again, other = (
        imagenet.random_part(picture, SIZE, tf.constant([1, n])).numpy()
        for n in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.fixture
def colourful(tmp_path):
    """A source of 8 pictures in 2 files, each with coordinates to be seen."""
    encoded = coordinates().numpy()
    imagenet_records.write(tmp_path, "train", [
        [imagenet_records.record(encoded, 1 + 4 * file + number) for number in range(4)]
        for file in range(2)])
    return imagenet.load("train", str(tmp_path), SIZE)


@pytest.mark.slow
def test_each_epoch_has_parts_of_its_own(colourful):
    batches = read(pipeline(colourful), 4)
    epochs = [dict(zip(together(part, "label"), together(part, "image")))
              for part in (batches[:2], batches[2:])]
    assert set(epochs[0]) == set(epochs[1]) == set(range(8))
    assert all((epochs[0][n] != epochs[1][n]).any() for n in range(8))


@pytest.mark.slow
@pytest.mark.parametrize("position", [1, 2, 5])
def test_training_goes_on_from_any_position(colourful, position):
    whole = read(pipeline(colourful), 7)
    rest = read(pipeline(colourful), 7 - position, position=position)
    for got, want in zip(rest, whole[position:], strict=True):
        for name in want:
            np.testing.assert_array_equal(got[name], want[name])


@pytest.mark.slow
def test_two_workers_have_the_batches_of_one(colourful):
    whole = read(pipeline(colourful), 3)
    parts = [read(pipeline(colourful), 3, shard=n, num_shards=2) for n in range(2)]
    for want, *halves in zip(whole, *parts, strict=True):
        for name in want:
            np.testing.assert_array_equal(
                np.concatenate([half[name] for half in halves]), want[name])


@pytest.mark.parametrize("data_dir", [None, "here"])
def test_without_records_it_says_how_to_get_them(data_dir, tmp_path):
    with pytest.raises(mpl.ConfigError) as error:
        imagenet.load("train", data_dir and str(tmp_path), SIZE)
    assert "holds no train-?????-of-?????" in str(error.value)
    assert "https://image-net.org" in error.value.remedy
    assert "--synthetic" in error.value.remedy


def test_a_truncated_file_is_named(tmp_path):
    path = imagenet_records.write_greys(tmp_path)[1]
    content = path.read_bytes()
    path.write_bytes(content[:-3])
    with pytest.raises(mpl.ConfigError) as error:
        imagenet.load("train", str(tmp_path), SIZE)
    said, size = str(error.value), len(content)
    assert f"File {path} ends inside record 4, which begins at byte " in said
    assert f"it has {size - 3} bytes, and needs {size}." in said
    assert "--max_bad_records=1" in error.value.remedy


def test_the_start_of_a_record_is_named(tmp_path):
    path, = imagenet_records.write_greys(tmp_path, files=1, per_file=2)
    first = 16 + int.from_bytes(path.read_bytes()[:8], "little")
    path.write_bytes(path.read_bytes()[:first + 5])
    with pytest.raises(mpl.ConfigError, match=f"record 1, .* at byte {first}:"):
        tfrecords.count(str(path))


def test_what_is_no_record_is_named(tmp_path):
    (tmp_path / "train-00000-of-01024").write_bytes(b"\x89PNG\r\n\x1a\n" * 4)
    with pytest.raises(mpl.ConfigError, match="ends inside record 0, which begins at"):
        imagenet.load("train", str(tmp_path), SIZE)


def bad_at(tmp_path, record, split="train"):
    """Writes two files, with a bad record as the third of the second."""
    files = [[imagenet_records.record(imagenet_records.grey(20), 1) for _ in range(4)]
             for _ in range(2)]
    files[1][2] = record
    imagenet_records.write(tmp_path, split, files)
    return str(tmp_path)


def noise():
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    return tf.io.encode_jpeg(pixels).numpy()


BAD = {
    "label 0": (lambda: imagenet_records.record(imagenet_records.grey(20), 0),
                "`image/class/label` is 0, and must lie in 1 ... 1000"),
    "label 1001": (lambda: imagenet_records.record(imagenet_records.grey(20), 1001),
                   "`image/class/label` is 1001, and must lie in 1 ... 1000"),
    "no label": (lambda: imagenet_records.record(
        imagenet_records.grey(20), None), "image/class/label"),
    "cut": (lambda: imagenet_records.record(noise()[:2000], 1), "JPEG"),
    "png": (lambda: imagenet_records.record(tf.io.encode_png(
        np.zeros((8, 8, 3), np.uint8)).numpy(), 1), "JPEG"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_record_is_named(kind, tmp_path):
    make, words = BAD[kind]
    made = once(imagenet.load("train", bad_at(tmp_path, make()), SIZE))
    with pytest.raises(mpl.ConfigError) as error, naming_damage([made]):
        read(made)
    path = tmp_path / "train-00001-of-01024"
    assert f"File {path} cannot be read after 2 examples: " in str(error.value)
    assert words in str(error.value)
    assert "--max_bad_records=1" in error.value.remedy


@pytest.mark.slow
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_record_is_left_out_on_request(kind, tmp_path):
    data_dir = bad_at(tmp_path, BAD[kind][0]())
    source = imagenet.load("train", data_dir, SIZE, max_bad_records=1)
    assert source.num_examples == 7
    batches = read(once(source))
    assert together(batches, "weight").sum() == 7
    assert (together(batches, "image") == 20).all()


@pytest.mark.slow
def test_an_image_cut_below_the_part_that_is_read_is_bad(tmp_path):
    data_dir = bad_at(tmp_path, imagenet_records.record(noise()[:-60], 1), "validation")
    source = imagenet.load("validation", data_dir, SIZE)
    assert len(read(once(source))) == 2  # the middle is whole
    with pytest.raises(mpl.ConfigError, match="00001-of-00128 cannot be read after 2"):
        source.find_fault(None)
    source = imagenet.load("validation", data_dir, SIZE, max_bad_records=1)
    assert source.num_examples == 7
    source.find_fault(lambda batch: batch)  # and is not read again


def test_synthetic_pixels_have_the_form_of_the_data():
    data = imagenet.synthetic(6, 40)
    assert data["image"].shape == (6, 40, 40, 3) and data["image"].dtype == np.uint8
    assert data["label"].dtype == np.int32 and 0 <= data["label"].min()
    assert data["label"].max() < 1000
