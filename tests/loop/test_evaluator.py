"""The inner evaluation loop: all of the data, with or without state."""

import pytest
import tensorflow as tf
from absl import logging

from mpl.loop import EndOfDataError, Evaluator, EvaluatorOptions

OPTIONS = {
    "while": EvaluatorOptions(),
    "python": EvaluatorOptions(use_tf_while_loop=False),
    "eager": EvaluatorOptions(use_tf_function=False, use_tf_while_loop=False),
}
every_mode = pytest.mark.parametrize("mode", OPTIONS)


def numbers(end, batch=1):
    dataset = tf.data.Dataset.range(end, output_type=tf.float32)
    return dataset.batch(batch, drop_remainder=True)


class Mean(Evaluator):
    """Sums in a variable, as metrics do."""

    def __init__(self, dataset, options=None, strategy=None):
        super().__init__(dataset, options)
        self.strategy = strategy or tf.distribute.get_strategy()
        with self.strategy.scope():
            self.total = tf.Variable(0.0, aggregation=tf.VariableAggregation.SUM)
        self.traces = 0

    def eval_begin(self):
        self.total.assign(0.0)

    def eval_step(self, iterator):
        self.traces += 1

        def add(batch):
            self.total.assign_add(tf.reduce_sum(batch))

        self.strategy.run(add, args=(next(iterator),))

    def eval_end(self):
        return {"total": self.total.numpy()}


class Listing(Evaluator):
    """Collects what each step returns, in Python."""

    def eval_begin(self):
        return []

    def eval_step(self, iterator):
        return {"batch": next(iterator)[0]}

    def eval_reduce(self, state, outputs):
        return state + [float(outputs["batch"])]

    def eval_end(self, state):
        return {"batches": state}


@every_mode
@pytest.mark.parametrize("replicas", [0, 2])
def test_evaluates_all_of_the_data_or_some_steps(mode, replicas, strategy_of):
    strategy = strategy_of(replicas)
    data = strategy.experimental_distribute_dataset(numbers(10, batch=2))
    evaluator = Mean(data, OPTIONS[mode], strategy)
    assert evaluator.evaluate() == {"total": 45.0}
    assert evaluator.steps_done == 5
    assert evaluator.evaluate(tf.constant(2)) == {"total": 0 + 1 + 2 + 3}
    assert evaluator.steps_done == 2
    assert evaluator.evaluate(-1) == {"total": 45.0}  # from the first batch again


@pytest.mark.parametrize("mode", ["while", "python"])
def test_is_traced_once(mode, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda *args: warnings.append(args))
    evaluator = Mean(numbers(5), OPTIONS[mode])
    evaluator.evaluate()
    traces = evaluator.traces
    for num_steps in (2, 3, -1):
        evaluator.evaluate(num_steps)
    evaluator.eval_dataset = numbers(7)
    assert evaluator.evaluate() == {"total": 21.0}
    assert evaluator.traces == traces <= 2 and not warnings


@every_mode
def test_hands_a_state_of_any_kind_from_step_to_step(mode):
    evaluator = Listing(numbers(4), OPTIONS[mode])
    assert evaluator.evaluate() == {"batches": [0.0, 1.0, 2.0, 3.0]}
    assert evaluator.evaluate(2) == {"batches": [0.0, 1.0]}


@every_mode
def test_the_first_state_may_be_made_by_eval_reduce(mode):
    class Late(Listing):
        def eval_begin(self):
            return None

        def eval_reduce(self, state=None, outputs=None):
            return (state or []) + [float(outputs["batch"])]

    assert Late(numbers(3), OPTIONS[mode]).evaluate() == {"batches": [0.0, 1.0, 2.0]}


@every_mode
def test_may_go_on_where_it_stopped_and_begins_anew_after_the_end(mode):
    options = EvaluatorOptions(
        OPTIONS[mode].use_tf_function,
        OPTIONS[mode].use_tf_while_loop,
        recreate_iterator_for_each_eval=False,
    )
    evaluator = Mean(numbers(5), options)
    assert evaluator.evaluate(3) == {"total": 0 + 1 + 2}
    assert evaluator.evaluate() == {"total": 3 + 4}
    assert evaluator.evaluate(3) == {"total": 0 + 1 + 2}


def test_says_when_there_are_fewer_batches_than_steps(monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda *args: warnings.append(args))
    assert Mean(numbers(3)).evaluate(9) == {"total": 3.0}
    assert warnings[0][0] % warnings[0][1:] == "The data gave 3 of 9 steps."


@every_mode
def test_no_data_is_an_error(mode):
    with pytest.raises(EndOfDataError, match="gave no batch"):
        Mean(numbers(0), OPTIONS[mode]).evaluate()


def test_checkpoints_hold_no_iterator(tmp_path):
    options = EvaluatorOptions(recreate_iterator_for_each_eval=False)
    evaluator = Mean(numbers(3), options)
    evaluator.evaluate(1)
    path = tf.train.Checkpoint(evaluator=evaluator).save(str(tmp_path / "ckpt"))
    names = [name for name, _ in tf.train.list_variables(path) if "evaluator" in name]
    assert [name.split("/")[1] for name in names] == ["total"]
