"""The inner training loop: three ways to run, one result."""

import keras
import pytest
import tensorflow as tf
from absl import logging

from mpl.errors import ConfigError
from mpl.loop import EndOfDataError, Trainer, TrainerOptions

OPTIONS = {
    "while": TrainerOptions(),
    "python": TrainerOptions(use_tf_while_loop=False),
    "eager": TrainerOptions(use_tf_function=False, use_tf_while_loop=False),
}
every_mode = pytest.mark.parametrize("mode", OPTIONS)


def numbers(end, batch=1):
    """0, 1, 2, … as float32 batches."""
    dataset = tf.data.Dataset.range(end, output_type=tf.float32)
    return dataset.batch(batch, drop_remainder=True)


class Summing(Trainer):
    """Adds each batch to a sum, a hundred times the step's number to a trace."""

    def __init__(self, dataset, options=None, strategy=None, limit=None):
        super().__init__(dataset, options)
        self.strategy = strategy or tf.distribute.get_strategy()
        with self.strategy.scope():
            self.global_step = tf.Variable(
                0, dtype=tf.int64, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA
            )
            self.total = tf.Variable(0.0, aggregation=tf.VariableAggregation.SUM)
            self.calls = tf.Variable(0.0, aggregation=tf.VariableAggregation.SUM)
        self.limit, self.events, self.traces = limit, [], 0

    def train_loop_begin(self):
        self.events.append("begin")

    def train_loop_end(self):
        self.events.append("end")
        return {"total": self.total.read_value()}

    def should_stop(self):
        return False if self.limit is None else self.global_step >= self.limit

    def add(self, batch):
        self.total.assign_add(tf.reduce_sum(batch))
        self.calls.assign_add(tf.constant(1.0))

    def train_step(self, iterator):
        self.traces += 1
        batch = next(iterator)
        self.strategy.run(self.add, args=(batch,))
        self.global_step.assign_add(1)


@every_mode
def test_runs_a_block_of_steps(mode):
    trainer = Summing(numbers(100), OPTIONS[mode])
    output = trainer.train(tf.constant(5, tf.int32))
    assert float(output["total"]) == 0 + 1 + 2 + 3 + 4
    assert trainer.steps_done == trainer.global_step.numpy() == 5
    assert int(trainer.position) == 5
    assert trainer.events == ["begin", "end"]
    trainer.train(2)
    assert trainer.total.numpy() == 21 and int(trainer.position) == 7
    assert trainer.steps_done == 2


@pytest.mark.parametrize("mode", ["while", "python"])
def test_blocks_of_any_length_and_new_iterators_share_one_trace(mode, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda *args: warnings.append(args))
    trainer = Summing(numbers(100).repeat(), OPTIONS[mode])
    for length in (3, tf.constant(1, tf.int64), tf.constant(4), 0, 2):
        trainer.train(length)
    traces = trainer.traces  # AutoGraph may look at a step more than once
    trainer.reset_iterator()
    trainer.train(5)
    trainer.train_dataset = numbers(50)
    trainer.train(-1)
    assert trainer.traces == traces <= 2
    assert not warnings


def test_a_retrace_warns_with_its_cause(monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda *args: warnings.append(args))
    trainer = Summing(numbers(100, batch=2))
    trainer.train(2)
    trainer.train_dataset = numbers(100, batch=3)
    trainer.train(2)
    message = warnings[0][0] % warnings[0][1:]
    assert "traced again" in message and "IteratorSpec" in message
    assert "shape=(2,)" in message and "shape=(3,)" in message
    trainer.train(2)
    assert len(warnings) == 1


@every_mode
@pytest.mark.parametrize("replicas", [0, 1, 2])
def test_trains_to_the_end_of_the_data_and_not_a_step_further(
    mode, replicas, strategy_of
):
    strategy = strategy_of(replicas)
    dataset = strategy.experimental_distribute_dataset(numbers(14, batch=2))
    trainer = Summing(dataset, OPTIONS[mode], strategy)
    trainer.train(-1)
    assert trainer.data_ended
    assert trainer.steps_done == int(trainer.position) == 7
    # Nothing of an eighth step ran, not even what does not depend on the batch.
    assert trainer.global_step.numpy() == 7
    assert trainer.calls.numpy() == 7 * max(replicas, 1)
    assert trainer.total.numpy() == sum(range(14))
    with pytest.raises(EndOfDataError, match="gave no batch.\nGive data"):
        trainer.train(-1)
    assert trainer.global_step.numpy() == 7 and trainer.steps_done == 0


@every_mode
def test_fewer_batches_than_steps(mode):
    trainer = Summing(numbers(4), OPTIONS[mode])
    trainer.train(10)
    assert trainer.steps_done == 4 and trainer.data_ended
    with pytest.raises(EndOfDataError):
        Summing(numbers(0), OPTIONS[mode]).train(1)


def test_steps_before_the_end_of_the_data_are_whole():
    class Slow(Summing):
        def add(self, batch):
            x = tf.fill([300, 300], batch[0])
            for _ in range(8):  # slower than taking the next batch
                x = tf.matmul(x, x) * 0.0
            self.total.assign_add(1.0 + x[0, 0])

    trainer = Slow(numbers(6).prefetch(6))
    for _ in range(5):
        trainer.total.assign(0.0)
        trainer.reset_iterator(position=0)
        trainer.train(-1)
        assert trainer.steps_done == 6 and trainer.total.numpy() == 6.0


@every_mode
def test_stops_before_the_next_step_when_it_should(mode):
    trainer = Summing(numbers(100), OPTIONS[mode], limit=3)
    trainer.train(10)
    assert trainer.steps_done == 3 and not trainer.data_ended
    assert int(trainer.position) == 3
    trainer.train(10)
    assert trainer.steps_done == 0


@every_mode
def test_steps_may_take_several_batches(mode):
    class Pairs(Summing):
        def train_step(self, iterator):
            self.total.assign_add(next(iterator)[0] - 10.0 * iterator.get_next()[0])
            self.global_step.assign_add(1)

    trainer = Pairs(numbers(9), OPTIONS[mode])
    trainer.train(3)
    assert trainer.total.numpy() == (0 - 10) + (2 - 30) + (4 - 50)
    assert int(trainer.position) == 6
    trainer.train(-1)  # 6 and 7; 8 has no partner, so no step
    assert trainer.steps_done == 1 and trainer.global_step.numpy() == 4
    assert trainer.total.numpy() == -84 + (6 - 70)


@every_mode
def test_batches_taken_in_a_loop_of_the_step_keep_their_order(mode):
    class Inner(Summing):
        def train_step(self, iterator):
            first = next(iterator)[0]
            for _ in tf.range(3):
                self.total.assign(10.0 * self.total + next(iterator)[0])
            self.total.assign(10.0 * self.total + next(iterator)[0])
            self.calls.assign(first)
            self.global_step.assign_add(1)

    trainer = Inner(numbers(10), OPTIONS[mode])
    trainer.train(1)
    assert trainer.total.numpy() == 1234.0 and trainer.calls.numpy() == 0.0
    assert int(trainer.position) == 5


@every_mode
def test_a_nest_of_data_counts_each_position(mode):
    class Two(Summing):
        def train_step(self, iterator):
            iterator, (other,) = iterator["a"], iterator["b"]
            self.total.assign_add(next(iterator)[0] * next(iterator)[0])
            self.total.assign_add(100.0 * next(other)[0])

    trainer = Two({"a": numbers(20), "b": (numbers(8),)}, OPTIONS[mode])
    trainer.train(3)
    assert trainer.total.numpy() == (0 * 1 + 2 * 3 + 4 * 5) + 100 * (0 + 1 + 2)
    assert int(trainer.position["a"]) == 6 and int(trainer.position["b"][0]) == 3
    trainer.reset_iterator()  # goes on where each of them was
    trainer.total.assign(0.0)
    trainer.train(1)
    assert trainer.total.numpy() == 6 * 7 + 100 * 3


@every_mode
def test_restoring_seeks_and_stores_no_iterator(mode, tmp_path):
    trainer = Summing(numbers(100), OPTIONS[mode])
    trainer.train(4)
    path = tf.train.Checkpoint(trainer=trainer).save(str(tmp_path / "ckpt"))
    names = {name for name, _ in tf.train.list_variables(path) if "trainer/" in name}
    assert {name.split("/")[1] for name in names} == {
        "position", "global_step", "total", "calls",
    }
    trainer.train(3)
    other = Summing(numbers(100), OPTIONS[mode])
    tf.train.Checkpoint(trainer=other).restore(path).assert_consumed()
    other.reset_iterator()
    other.train(3)
    assert other.total.numpy() == trainer.total.numpy() == sum(range(7))
    other.reset_iterator(position=0)
    other.train(2)
    assert other.total.numpy() == sum(range(7)) + 1 and int(other.position) == 2


def test_distributed_data_without_seek_say_that_they_begin_anew(
    strategy_of, monkeypatch
):
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda *args: warnings.append(args))
    strategy = strategy_of(2)
    data = strategy.experimental_distribute_dataset(numbers(40, batch=2))
    trainer = Summing(data, strategy=strategy)
    trainer.train(2)
    trainer.reset_iterator()
    trainer.train(2)
    assert trainer.total.numpy() == 2 * (0 + 1 + 2 + 3)
    assert "begins anew" in warnings[0][0]


def test_data_made_at_a_position():
    class Lazy(Summing):
        def make_train_dataset(self):
            return numbers(50).skip(int(self.position.numpy()))

    trainer = Lazy(None)
    trainer.position.assign(7)
    trainer.train(1)
    assert trainer.total.numpy() == 7.0 and int(trainer.position) == 8


@every_mode
@pytest.mark.parametrize("replicas", [0, 2])
def test_variables_may_be_made_by_the_first_step(mode, replicas, strategy_of):
    class Late(Summing):
        late = None

        def train_step(self, iterator):
            if self.late is None:
                with self.strategy.scope():
                    self.late = tf.Variable(0.0)
            self.late.assign_add(1.0)
            super().train_step(iterator)

    strategy = strategy_of(replicas)
    data = strategy.experimental_distribute_dataset(numbers(20, batch=2))
    trainer = Late(data, OPTIONS[mode], strategy)
    trainer.train(4)
    assert float(trainer.late.numpy()) == 4.0
    assert trainer.total.numpy() == sum(range(8)) and int(trainer.position) == 4


@every_mode
def test_a_keras_model_trains_alike_in_every_mode_and_on_two_replicas(
    mode, strategy_of
):
    def weights(mode, replicas):
        keras.utils.set_random_seed(3)
        strategy = strategy_of(replicas)
        with strategy.scope():
            model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])

        class Training(Trainer):
            def train_step(self, iterator):
                def replica_step(x):
                    with tf.GradientTape() as tape:
                        loss = tf.reduce_sum(model(x) ** 2)
                    gradients = tape.gradient(loss, model.trainable_variables)
                    context = tf.distribute.get_replica_context()
                    gradients = context.all_reduce("SUM", gradients)
                    for variable, gradient in zip(model.trainable_variables, gradients):
                        variable.assign(variable - 0.01 * gradient)

                strategy.run(replica_step, args=(next(iterator),))

        x = tf.random.stateless_normal([8, 3], [1, 2])
        data = tf.data.Dataset.from_tensor_slices(x).batch(4, True).repeat()
        data = strategy.experimental_distribute_dataset(data)
        Training(data, OPTIONS[mode]).train(10)
        return model.get_weights()

    expected = weights("eager", 0)
    for replicas in (0, 2):
        for got, want in zip(weights(mode, replicas), expected):
            assert abs(got - want).max() < 1e-6


def test_bad_arguments_say_what_to_do():
    with pytest.raises(ConfigError, match="are a NoneType.*\nUse tf.data.Dataset"):
        Summing(None).train(1)

    class Nest(Summing):
        def make_train_dataset(self):
            return numbers(1), numbers(1)

    with pytest.raises(ValueError, match="don't have the same nested structure"):
        Nest(None).train(1)


def test_an_error_of_the_step_passes_through():
    class Wrong(Summing):
        def train_step(self, iterator):
            tf.debugging.assert_less(next(iterator), 2.0)

    with pytest.raises(tf.errors.InvalidArgumentError):
        Wrong(numbers(5)).train(5)
