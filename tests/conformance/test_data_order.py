"""The order of the examples as steps see them: replicas and resumes change nothing."""

import numpy as np
import pytest
import tensorflow as tf

import mpl
from mpl.record.checkpoint import Checkpoints

EXAMPLES, BATCH, STEPS = 50, 8, 12  # 7 batches an epoch, the last of 2 examples
EPOCH = 7
NUMBERS = np.arange(EXAMPLES, dtype=np.int64)


class Noting(mpl.Experiment):
    """Notes the numbers of the examples of each step, -1 for those of weight 0."""

    files = ""

    def build_data(self, split, context):
        if split != "train":
            return None
        if not self.files:
            return {"number": NUMBERS}
        return mpl.FileSource(self.files, self.read, shuffle_buffer=5)

    def read(self, path):
        records = tf.data.FixedLengthRecordDataset(path, 8)
        return records.map(lambda record: {
            "number": tf.reshape(tf.io.decode_raw(record, tf.int64), [])})

    def build_model(self):
        model = tf.Module()
        model.weight = tf.Variable(1.0)
        return model

    def setup(self, config, strategy):
        super().setup(config, strategy)
        self.seen = tf.Variable(tf.fill([STEPS, BATCH], tf.constant(-2, tf.int64)))

    def train_step(self, iterator):
        batch = next(iterator)
        number, weight = (
            tf.concat(self.strategy.experimental_local_results(batch[name]), 0)
            for name in ("number", "weight"))
        numbers = tf.where(weight > 0, number, -1)
        self.seen.scatter_nd_update([[self.global_step]], [numbers])
        super().train_step(iter([batch]))

    def loss(self, batch, training):
        losses = self.model.weight * tf.cast(batch["number"], tf.float32)
        return mpl.LossOutput(losses, batch["weight"])


def prepared(files, strategy):
    experiment = Noting()
    experiment.files = files
    config = mpl.RunConfig(
        policy="float32", global_batch_size=BATCH, train_steps=STEPS, seed=3)
    experiment.setup(config, strategy)
    return experiment


@pytest.mark.slow
@pytest.mark.parametrize("source", ["memory", "files"])
def test_steps_see_one_order_on_1_2_4_replicas_and_after_each_resume(
    source, strategy_of, tmp_path
):
    files = ""
    if source == "files":
        for number, part in enumerate(np.array_split(NUMBERS, 4)):
            (tmp_path / f"{number}.i64").write_bytes(part.tobytes())
        files = str(tmp_path / "*.i64")
    whole = prepared(files, strategy_of(1))
    whole.trainer.train(STEPS)
    expected = whole.seen.numpy()
    first, second = expected[:EPOCH].ravel(), expected[EPOCH:].ravel()
    real = first[first >= 0]
    assert sorted(real) == list(NUMBERS) != list(real)
    assert (first == -1).sum() == EPOCH * BATCH - EXAMPLES
    assert len(set(second)) == second.size and list(second) != list(first[:len(second)])
    for before, after, step in ((1, 2, 5), (2, 4, 7), (4, 1, 10)):
        one = prepared(files, strategy_of(before))
        one.trainer.train(step)
        np.testing.assert_array_equal(one.seen.numpy()[:step], expected[:step])
        folder = tmp_path / f"{before} to {after}"
        Checkpoints(
            folder, asynchronous=False, **one.checkpoint_objects()).save(step)
        other = prepared(files, strategy_of(after))
        assert Checkpoints(folder, **other.checkpoint_objects()).resume() == step
        other.after_restore()
        other.trainer.train(STEPS - step)
        np.testing.assert_array_equal(other.seen.numpy()[step:], expected[step:])
        assert (other.seen.numpy()[:step] == -2).all()
