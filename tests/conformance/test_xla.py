"""Every experiment's whole step is one XLA program, as a TPU asks for."""

import importlib
import pathlib

import numpy as np
import pytest
import tensorflow as tf

import mpl
from mpl.step.binding import flatten_layers

pytestmark = pytest.mark.slow  # XLA compiles for seconds

ROOT = pathlib.Path(__file__).parents[2]
MODULES = [importlib.import_module(f"experiments.{path.stem}")
           for path in sorted((ROOT / "experiments").glob("[!_]*.py"))]
KINDS = [value for module in MODULES for value in vars(module).values()
         if isinstance(value, type) and issubclass(value, mpl.Experiment)
         and value.__module__ == module.__name__]
# What leaves the device in the middle of a program, or prints.
OF_THE_HOST = ("PyFunc", "Host", "Print", "Infeed", "Outfeed", "_Send", "_Recv",
               "Iterator", "Summary", "String", "File")
SETTINGS = {
    "float32": {"policy": "float32"},
    "mixed_bfloat16": {"policy": "mixed_bfloat16"},
    "accumulated": {"policy": "float32", "loss_scale": "dynamic",
                    "accumulate_steps": 2},
}
# What compiles for minutes is made smaller. A low rate keeps rounding from growing.
SMALL = {
    "CifarResnet": {"depth": 8, "learning_rate": 1e-3},
    "Linear": {"learning_rate": 1e-3},
    "ImagenetResnet": {"synthetic": True, "depth": "14", "width": 4, "image_size": 32,
                       "learning_rate": 1e-3},
    "Bert": {"layers": 1, "hidden": 16, "heads": 2, "length": 16, "masked": 3,
             "warmup_steps": 0},
    "CharLm": {"depth": 1, "width": 32, "length": 32, "warmup_steps": 0},
    "Medical": {"filters": 2},
}


def cases(one):
    """All settings for two loops, and one for each of the others.

    XLA keeps what it compiled until the process ends, some 0.1 GB each.
    """
    return [(kind, settings) for kind in KINDS for settings in SETTINGS
            if kind.__name__ in ("Digits", "GanDigits") or settings == one]


def prepared(kind, noise=True, **settings):
    own_step = kind.train_step is not mpl.Experiment.train_step
    if own_step and not kind.accumulates:
        settings = {**settings, "accumulate_steps": 1}
    settings = {**settings, **SMALL.get(kind.__name__, {})}
    config = (kind.Config or mpl.RunConfig)(global_batch_size=16, **settings)
    experiment = kind()
    experiment.setup(config, tf.distribute.OneDeviceStrategy("CPU:0"))
    for model in tf.nest.flatten(experiment.model) if not noise else ():
        for layer in flatten_layers(model):
            for rate in ("rate", "stddev", "dropout", "recurrent_dropout"):
                if hasattr(layer, rate):
                    setattr(layer, rate, 0.0)
    return experiment


def steps_of(experiment, compiled):
    """Returns the training and the evaluation step as functions of a batch."""
    def function_of(step):
        return tf.function(
            lambda batch: step(iter([batch])), autograph=False, jit_compile=compiled)

    steps = experiment.trainer, experiment.evaluators["validation"]
    return function_of(steps[0].train_step), function_of(steps[1].eval_step)


def batches(experiment, count):
    return list(experiment.pipelines["train"].dataset().take(count))


def losses(experiment, compiled, count=3):
    """Returns the mean losses of some training steps, then that of an evaluation."""
    train, evaluate = steps_of(experiment, compiled)
    values = []
    for batch in batches(experiment, count):
        experiment.trainer.reset_metrics()
        train(batch)
        values.append(float(experiment.train_report()["loss"]))
    evaluator = experiment.evaluators["validation"]
    evaluator.eval_begin()
    evaluate(batch)
    return [*values, float(evaluator.eval_end()["loss"])]


def nodes_of(concrete):
    graph = concrete.graph.as_graph_def(add_shapes=True)
    functions = (function.node_def for function in graph.library.function)
    return [node for nodes in (graph.node, *functions) for node in nodes]


def test_experiments_are_found():
    assert {"Digits", "GanDigits"} <= {kind.__name__ for kind in KINDS}


@pytest.mark.parametrize("kind, settings", cases("mixed_bfloat16"))
def test_a_step_is_one_program_of_static_shapes(kind, settings):
    experiment = prepared(kind, **SETTINGS[settings])
    batch, = batches(experiment, 1)
    before = [bucket.variable.numpy() for weights in
              tf.nest.flatten(experiment.weights) for bucket in weights.buckets]
    for step in steps_of(experiment, compiled=True):
        concrete = step.get_concrete_function(batch)
        nodes = nodes_of(concrete)
        assert len(nodes) > 50
        assert not [node.op for node in nodes if any(
            word in node.op for word in OF_THE_HOST)]
        for node in nodes:
            for shape in node.attr["_output_shapes"].list.shape:
                assert not shape.unknown_rank, node.name
                assert -1 not in [dim.size for dim in shape.dim], node.name
        program = step.experimental_get_compiler_ir(batch)(stage="hlo")
        assert program.count("\nENTRY ") == 1
        for word in ("<=", "infeed(", "outfeed(", "send(", "recv(", "callback"):
            assert word not in program, word
        step(batch)
    report = experiment.train_report()
    assert report["applied_steps"] == 1 and np.isfinite(report["loss"])
    after = [bucket.variable.numpy() for weights in
             tf.nest.flatten(experiment.weights) for bucket in weights.buckets]
    assert all((old != new).any() for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("kind, settings", cases("accumulated"))
def test_a_compiled_step_has_the_same_loss(kind, settings):
    """Without noise: XLA draws other random numbers."""
    got, want = (losses(prepared(kind, noise=False, **SETTINGS[settings]), compiled)
                 for compiled in (True, False))
    rtol = 2e-2 if settings == "mixed_bfloat16" else 1e-5
    np.testing.assert_allclose(got, want, rtol=rtol)
    assert len(set(want)) == len(want)  # it trains


def test_a_program_that_calls_python_is_found():
    def body(x):
        x = tf.py_function(lambda x: x + 1, [x], tf.float32)
        return tf.ensure_shape(x, [])

    step = tf.function(lambda x: tf.while_loop(lambda x: x < 9, body, [x]))
    nodes = nodes_of(step.get_concrete_function(tf.constant(1.0)))
    assert any(word in node.op for node in nodes for word in OF_THE_HOST)
