"""What --mode=predict reads, of files that anybody may have written, and writes."""

import io
import types

import numpy as np
import pytest
import tensorflow as tf

import mpl
from mpl.errors import ConfigError
from mpl.launch import predictions

IMAGE = {"image": tf.TensorSpec([None, 2, 3, 1], tf.uint8)}


class Reader(mpl.Experiment):
    """Never set up."""

    def __init__(self, path, size=2):
        self.config = types.SimpleNamespace(input=str(path), global_batch_size=size)


def read(path, specs=IMAGE, kind=Reader, size=2):
    total, batches, names = predictions.examples(kind(path, size), specs)
    return total, list(batches), names


def content(save, *args, **kwargs):
    buffer = io.BytesIO()
    save(buffer, *args, **kwargs)
    return buffer.getvalue()


GOOD = content(np.savez, x=np.array([1, 201, 7]))


def test_arrays_are_read_by_name_and_in_batches(tmp_path):
    (tmp_path / "input.npz").write_bytes(GOOD)
    total, batches, names = read(tmp_path / "input.npz")
    assert (total, names) == (2, [])
    assert [batch["x"].tolist() for batch in batches] == [[1, 201], [7]]


def test_arrays_of_several_lengths_are_refused(tmp_path):
    np.savez(tmp_path / "input.npz", x=np.ones(3), y=np.ones(2))
    with pytest.raises(ConfigError, match="same number of examples"):
        read(tmp_path / "input.npz")


@pytest.mark.parametrize("bad", [
    b"", GOOD[:-30], GOOD.replace(b"\xc9", b"\xca"), b"x,y\n1,2\n",
    content(np.save, np.arange(6)), content(np.savez, x=np.array([None])),
], ids=["empty", "cut", "damaged", "csv", "npy", "objects"])
def test_other_files_are_refused_in_two_lines(bad, tmp_path):
    (tmp_path / "input.npz").write_bytes(bad)
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / "input.npz")
    assert caught.value.cause.startswith(f"`input` ({tmp_path / 'input.npz'}) must be")
    assert caught.value.remedy == "Write one with numpy.savez(path, name=array)."
    assert str(caught.value).count("\n") == 1


def save_images(folder, *names, shape=(2, 3, 1)):
    """Saves images whose first pixel is their number."""
    for number, name in enumerate(names):
        image = np.full(shape, 100, np.uint8)
        image[0, 0, 0] = number
        (folder / name).write_bytes(tf.io.encode_png(image).numpy())


def test_a_folder_of_images_in_the_order_of_their_names(tmp_path):
    save_images(tmp_path, "b.png", "a.PNG", "c.png")
    (tmp_path / "notes.txt").write_text("no image")
    total, batches, names = read(tmp_path)
    assert total == 2
    assert names == [str(tmp_path / name) for name in ("a.PNG", "b.png", "c.png")]
    assert [batch["image"][:, 0, 0, 0].tolist() for batch in batches] == [[1, 0], [2]]
    assert batches[0]["image"].shape == (2, 2, 3, 1)
    assert batches[0]["image"].dtype == np.uint8
    assert read(tmp_path / "c.png")[1][0]["image"][0, 0, 0, 0] == 2


def test_images_take_the_shape_and_channels_of_the_model(tmp_path):
    save_images(tmp_path, "large.png", shape=(20, 30, 3))
    pixels = np.full((20, 30, 3), 100, np.uint8)
    (tmp_path / "jpeg.jpg").write_bytes(tf.io.encode_jpeg(pixels, quality=100).numpy())
    ((batch,),) = [read(tmp_path)[1]]
    assert batch["image"].shape == (2, 2, 3, 1)
    assert np.abs(batch["image"].astype(int) - 100).max() <= 2
    anysize = {"image": tf.TensorSpec([None, None, None, 3], tf.uint8)}
    save_images(tmp_path, "small.png", shape=(1, 1, 3))
    shapes = [batch["image"].shape for batch in read(tmp_path, anysize)[1]]
    assert shapes == [(1, 20, 30, 3), (1, 20, 30, 3), (1, 1, 1, 3)]


def test_the_experiment_knows_the_range_and_formats_of_its_own(tmp_path):
    class Own(Reader):
        def from_pixels(self, pixels):
            return pixels / 100

        def read_input(self, path):
            if path.endswith(".txt"):
                return [{"x": np.loadtxt(path)}]

    save_images(tmp_path, "a.png")
    floats = {"image": tf.TensorSpec([None, 2, 3, 1], tf.float32)}
    (batch,) = read(tmp_path, floats, Own)[1]
    assert batch["image"].dtype == np.float32
    assert batch["image"].ravel().tolist() == [0, 1, 1, 1, 1, 1]
    (tmp_path / "x.txt").write_text("1.5 2.5")
    total, batches, names = read(tmp_path / "x.txt", floats, Own)
    assert (total, names, batches[0]["x"].tolist()) == (None, [], [1.5, 2.5])
    with pytest.raises(ConfigError, match="an unknown range: {'image'.*\nDefine `fr"):
        read(tmp_path, floats)


def test_formats_of_its_own_are_cut_into_batches(tmp_path):
    class Own(Reader):
        def read_input(self, path):
            x = np.arange(7)
            return [{"x": x[:5], "y": x[:5, np.newaxis]}, {"x": x[:0]}, {"x": x[5:]}]

    _, batches, _ = read(tmp_path, IMAGE, Own)
    assert [batch["x"].tolist() for batch in batches] == [[0, 1], [2, 3], [4], [5, 6]]
    assert batches[2]["y"].tolist() == [[4]]


@pytest.mark.parametrize("specs", [
    {"x": tf.TensorSpec([None, 4])}, {**IMAGE, "mask": IMAGE["image"]}])
def test_where_images_are_not_one_feature_it_is_an_error(specs, tmp_path):
    save_images(tmp_path, "a.png")
    with pytest.raises(ConfigError, match="not one feature: .*\nDefine `from_pixels"):
        read(tmp_path, specs)


def test_a_damaged_image_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"a.png` is no image that can be read"):
        read(tmp_path)


def test_what_is_written(tmp_path):
    save_images(tmp_path, "a.png", "b.png", "c.png")
    out = str(tmp_path / "out.npz")
    first = predictions.write(
        Reader(tmp_path), out, lambda batch: batch["image"][:, 0, 0, 0], IMAGE)
    assert first == 3 and not (tmp_path / "out.npz.tmp").exists()
    with np.load(out) as arrays:
        assert sorted(arrays) == ["image_file", "predictions"]
        assert arrays["predictions"].tolist() == [0, 1, 2]
        assert arrays["image_file"][1] == str(tmp_path / "b.png")
    (tmp_path / "input.npz").write_bytes(GOOD)
    reader = Reader(tmp_path / "input.npz")
    predictions.write(reader, out, lambda batch: {"double": 2 * batch["x"]})
    with np.load(out) as arrays:
        assert {n: a.tolist() for n, a in arrays.items()} == {"double": [2, 402, 14]}


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    class Nothing(Reader):
        def read_input(self, path):
            return []

    out = tmp_path / "out.npz"
    out.write_text("old")
    with pytest.raises(ConfigError, match=r"`input` .* holds no examples"):
        predictions.write(Nothing(out), str(out), len)
    with pytest.raises(ConfigError, match=r"`input` \(x\) does not exist"):
        predictions.write(Nothing("x"), str(out), len)
    assert out.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out.npz"]
