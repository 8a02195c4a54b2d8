"""Evaluations of an experiment again and again: each is of the whole split."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import mpl

NUMBERS = np.arange(10, dtype=np.float32)


class Numbers(mpl.Experiment):
    """Its loss is the mean of the numbers it was shown."""

    def build_model(self):
        return keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])

    def build_data(self, split, context):
        arrays = {"x": NUMBERS[:, None]}
        if split == "test":  # nobody knows how many they are
            dataset = tf.data.Dataset.from_tensor_slices(arrays)
            return dataset.filter(lambda example: True)
        return arrays

    def loss(self, batch, training):
        return mpl.LossOutput(batch["x"][:, 0], batch["weight"])


@pytest.fixture(params=[1, 2])
def numbers(request, strategy_of):
    experiment = Numbers()
    config = mpl.RunConfig(train_steps=1, global_batch_size=4, policy="float32")
    experiment.setup(config, strategy_of(request.param))
    return experiment


def losses(evaluator, *num_steps):
    return [float(evaluator.evaluate(steps)["loss"]) for steps in num_steps]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_each_is_of_the_whole_split(numbers, split):
    evaluator = numbers.evaluators[split]
    assert losses(evaluator, -1, -1, -1) == [4.5, 4.5, 4.5]
    assert evaluator.steps_done == 3
    assert losses(evaluator, 1, 2, -1, 9) == [1.5, 3.5, 4.5, 4.5]


def test_the_iterator_stays_as_long_as_it_stands_at_the_first_batch(numbers):
    evaluator = numbers.evaluators["validation"]
    evaluator.evaluate()
    first = evaluator.loop.iterators
    evaluator.evaluate()
    evaluator.evaluate(3)
    assert evaluator.loop.iterators is first
    evaluator.evaluate(2)
    assert evaluator.loop.iterators is None


def test_after_one_that_was_broken_off(numbers):
    evaluator = numbers.evaluators["validation"]
    evaluator.loop.halt.assign(True)
    assert evaluator.evaluate() is None and evaluator.steps_done == 0
    evaluator.loop.halt.assign(False)
    assert evaluator.loop.iterators is None
    assert losses(evaluator, -1) == [4.5]
