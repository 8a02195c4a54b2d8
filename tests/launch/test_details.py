"""What TensorBoard shows of a run; that it costs no bit, and shows no step twice."""

import collections
import dataclasses
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf

import mpl
from mpl.errors import ConfigError

pytest.importorskip("tensorboard")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(20, 3)).astype(np.float32)
Y = (X.sum(axis=1) > 0).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Config(mpl.RunConfig):
    global_batch_size = 8
    learning_rate = 0.5
    optimizer = "sgd"
    policy = "mixed_float16"
    train_steps = 6
    log_every_steps = 2
    checkpoint_every_steps = 3


class Shown(mpl.Experiment):
    """Two classes; dropout, so that seeds matter."""

    Config = Config

    def build_model(self):
        return keras.Sequential([
            keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dropout(0.5),
            keras.layers.Dense(2, dtype="float32"),
        ])

    def build_data(self, split, context):
        return {"x": X, "y": Y} if split != "test" else None

    def loss(self, batch, training):
        logits = self.model(batch["x"], training=training)
        losses = keras.losses.sparse_categorical_crossentropy(
            batch["y"], logits, from_logits=True)
        return mpl.LossOutput(losses, batch["weight"])

    def predict(self, batch):
        return self.model(batch["x"], training=False)


class Pictured(Shown):
    def images(self, batch):
        pixels = tf.reshape(self.predict(batch), [-1, 1, 2, 1])
        return {"logits": tf.clip_by_value(pixels, 0.0, 1.0)}


def events_in(folder):
    """Returns [(tag, step, tensor)] of the event files of a folder."""
    found = []
    for path in sorted(pathlib.Path(folder).glob("*.tfevents.*")):
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            if event.graph_def:
                graph = tf.compat.v1.GraphDef.FromString(event.graph_def)
                found.append(("graph", event.step, graph))
            for value in event.summary.value:
                found.append((value.tag, event.step, tf.make_ndarray(value.tensor)))
    return found


def of(events, tag):
    return {step: value for name, step, value in events if name == tag}


def weights_of(workdir, step):
    reader = tf.train.load_checkpoint(f"{workdir}/checkpoints/ckpt-{step}")
    shapes = reader.get_variable_to_shape_map()
    return {name: reader.get_tensor(name) for name in shapes if "model" in name}


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2])
def test_histograms_are_of_that_step_and_change_no_bit(replicas, tmp_path):
    settings = {"train_steps": 6, "num_devices": replicas, "checkpoint_every_steps": 1,
                "strategy": "mirrored" if replicas > 1 else "one_device"}
    plain, shown = str(tmp_path / "plain"), str(tmp_path / "shown")
    mpl.run(Shown, workdir=plain, **settings)
    mpl.run(Shown, workdir=shown, histogram_every_steps=4, max_to_keep=9, **settings)
    events = events_in(f"{shown}/summaries/train")
    tags = {tag for tag, _, _ in events if "/" in tag}
    names = {f"{layer}/{kind}" for layer in ("dense", "dense_1")
             for kind in ("kernel", "bias")}
    assert {tag.partition("/")[0] for tag in tags} == {"weights", "gradients"}
    assert len(tags) == 8 and all(tag.endswith(tuple(names)) for tag in tags)
    assert all(set(of(events, tag)) == {4} for tag in tags)
    for kind in ("weights", "gradients"):
        counts = sorted(int(of(events, tag)[4][:, 2].sum()) for tag in tags
                        if tag.startswith(kind))
        assert counts == [2, 4, 8, 12]  # as many as the variables have elements
    one, other = weights_of(plain, 6), weights_of(shown, 6)
    assert one.keys() == other.keys() and len(one) >= 4
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_a_gradient_is_the_true_one(tmp_path):
    class Line(Shown):
        def build_model(self):
            return keras.Sequential(
                [keras.Input((3,)), keras.layers.Dense(1, use_bias=False)])

        def loss(self, batch, training):
            outputs = tf.cast(self.model(batch["x"]), tf.float32)[:, 0]
            return mpl.LossOutput(outputs, batch["weight"])

        def build_data(self, split, context):
            return {"x": np.tile(np.float32([[1, 2, -3]]), [8, 1])}

    mpl.run(Line, workdir=str(tmp_path), train_steps=2, histogram_every_steps=1,
            loss_scale=1024, clip_norm=0.5, mode="train")
    (tag,) = {t for t, _, _ in events_in(tmp_path / "summaries/train")
              if t.startswith("gradients/")}
    found = of(events_in(tmp_path / "summaries/train"), tag)
    # d(mean of x·w)/dw = x, unscaled and not clipped: from -3 to 2.
    assert sorted(found) == [1, 2]
    for histogram in found.values():
        assert histogram[:, 2].sum() == 3
        assert (histogram[0, 0], histogram[-1, 1]) == (-3.0, 2.0)
        assert (histogram[0, 2], histogram[-1, 2]) == (1, 1)


def test_flags_parameters_graphs_and_images_once(tmp_path):
    mpl.run(Pictured, workdir=str(tmp_path))
    train = events_in(tmp_path / "summaries/train")
    (flags,), (parameters,) = of(train, "flags").values(), of(
        train, "parameters").values()
    flags, parameters = str(flags.item(), "utf-8"), str(parameters.item(), "utf-8")
    assert "| policy | mixed_float16 |" in flags and "| seed | 0 |" in flags
    lines = parameters.splitlines()
    assert lines[0] == (
        "| variable | shape | master | compute | bucket | parameters |")
    assert lines[-1] == "| total |  |  |  |  | 26 |"
    table = {tuple(line.split(" | ")[1:4]) for line in lines[2:-1]}
    assert table == {
        ("(3, 4)", "float32", "float16"), ("(4,)", "float32", "float16"),
        ("(4, 2)", "float32", "float32"), ("(2,)", "float32", "float32"),
    }
    validation = events_in(tmp_path / "summaries/validation")
    for events in (train, validation):
        (graph,) = of(events, "graph").values()
        functions = [graph.node, *(f.node_def for f in graph.library.function)]
        assert any(node.op == "MatMul" for nodes in functions for node in nodes)
    images = of(validation, "logits")
    assert list(images) == [6] and len(images[6]) == 2 + 8  # width, height, images
    assert images[6][:2].tolist() == [b"2", b"1"]


def twice(events):
    counts = collections.Counter((tag, step) for tag, step, _ in events)
    return [key for key, count in counts.items() if count > 1]


def test_no_step_appears_twice_after_a_resume(tmp_path):
    settings = {"workdir": str(tmp_path), "histogram_every_steps": 3}
    splits = ("train", "validation")
    mpl.run(Pictured, eval_every_steps=2, **settings)
    whole = {split: events_in(tmp_path / "summaries" / split) for split in splits}
    for path in (tmp_path / "checkpoints").glob("ckpt-6.*"):
        path.unlink()  # as if it had been killed after step 3 was saved
    (tmp_path / "checkpoints" / "checkpoint").unlink()
    mpl.run(Pictured, eval_every_steps=2, **settings)
    mpl.run(Pictured, mode="eval", workdir=str(tmp_path))
    for split in splits:
        events = events_in(tmp_path / "summaries" / split)
        assert not twice(events)
        steps = {(tag, step) for tag, step, _ in events}
        once = {"flags", "parameters", "graph"}
        assert {key for key in steps if key[0] not in once} == {
            (tag, step) for tag, step, _ in whole[split] if tag not in once}
        assert "graph" in {tag for tag, _ in steps}


def test_without_summaries_histograms_are_refused():
    cause = "`histogram_every_steps` .5. needs `summary_every_steps`, which is 0"
    with pytest.raises(ConfigError, match=cause):
        Config(histogram_every_steps=5, summary_every_steps=0)
