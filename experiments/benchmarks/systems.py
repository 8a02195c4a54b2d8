"""The systems that the benchmark compares, all with the same weights, data and rule."""

import os
import resource
import tempfile
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from experiments.benchmarks import works

SEED = 0


class System:
    """One way to train a work.

    Args:
        work: name in `works.WORKS`.
        policy: a Keras dtype policy.
        dynamic: whether the loss is scaled dynamically.
        jit_compile: whether XLA compiles the step; None: the system's default.
    """

    model: keras.Model
    optimizer: keras.optimizers.Optimizer
    steps_per_call = 1  # of the host

    def __init__(self, work: str, policy: str, dynamic: bool, jit_compile: Any = None):
        self.work, self.policy, self.dynamic = works.WORKS[work], policy, dynamic
        self.jit_compile, self.steps = jit_compile, 0
        arrays = self.work.make_data(self.work.num_examples)
        self.arrays = {n: a[: self.work.num_examples] for n, a in arrays.items()}
        self.build()

    def build(self) -> None:
        """Makes model, optimizer and data."""
        raise NotImplementedError

    def train(self, num_steps: int) -> None:
        """Runs steps and waits for them."""
        raise NotImplementedError

    def run(self, num_steps: int) -> None:
        """Runs steps, and counts them."""
        self.train(num_steps)
        self.steps += num_steps

    def prepare(self, num_steps: int) -> None:
        """Traces what blocks of so many steps may need."""

    def settle(self, num_steps: int) -> None:
        """Finds out how blocks of so many steps run fastest."""

    def make_model(self) -> keras.Model:
        """Returns the model of the work, the same in each system."""
        keras.utils.set_random_seed(SEED)
        keras.config.set_dtype_policy(self.policy)
        return self.work.build_model()

    def dataset(self) -> tf.data.Dataset:
        """Returns batches (x, y), for ever, in the order of the arrays."""
        data = tf.data.Dataset.from_tensor_slices((self.arrays["x"], self.arrays["y"]))
        data = data.cache().repeat().batch(self.work.batch_size, drop_remainder=True)
        options = tf.data.Options()
        # Its thread holds up the end of an iterator, and so of `fit`, by half a second.
        options.autotune.enabled = False
        return data.prefetch(4).with_options(options)

    def loss(self) -> float:
        """Returns the mean loss of the first batch, dropout off."""
        x, y = (self.arrays[n][: self.work.batch_size] for n in "xy")
        return float(tf.reduce_mean(self.work.loss(y, self.model(x, training=False))))

    def facts(self) -> dict[str, Any]:
        """Returns what the report needs to know."""
        size, count = self.work.batch_size, self.work.num_examples
        num_bytes = sum(array.nbytes for array in self.arrays.values()) * size // count
        return {
            "variables": len(self.model.trainable_variables),
            "parameters": self.model.count_params(),
            "batch_size": size,
            "bytes_per_step": num_bytes,
        }

    def flops(self) -> float:
        """Returns the operations of matrix products and convolutions in a step."""
        x, y = (self.arrays[n][: self.work.batch_size] for n in "xy")

        @tf.function
        def step():
            with tf.GradientTape() as tape:
                loss = self.work.loss(tf.constant(y), self.model(x, training=True))
            return tape.gradient(loss, self.model.trainable_variables)

        profiler = tf.compat.v1.profiler
        options = profiler.ProfileOptionBuilder.float_operation()
        options["output"] = "none"
        graph = step.get_concrete_function().graph
        return profiler.profile(graph, options=options).total_float_ops

    def memory(self) -> dict[str, Any]:
        """Returns peaks since the start of the process, in MB of 10⁶ bytes."""
        allocator = None
        if tf.config.list_physical_devices("GPU"):
            allocator = tf.config.experimental.get_memory_info("GPU:0")["peak"] / 1e6
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"peak_rss_mb": kilobytes * 1.024e-3, "allocator_peak_mb": allocator}

    def save(self, path: str) -> None:
        """Writes a checkpoint of model and optimizer."""
        checkpoint = tf.train.Checkpoint(model=self.model, optimizer=self.optimizer)
        checkpoint.write(path)

    def time_checkpoints(self, count: int) -> list[float]:
        """Returns for how many seconds each of `count` saves holds up training."""
        with tempfile.TemporaryDirectory() as folder:
            return [_secs(lambda: self.save(os.path.join(folder, str(number))))
                    for number in range(count)]

    def predictor(self) -> Callable:
        """Returns a function from x `[n, ...]` to outputs."""
        return tf.function(lambda x: self.model(x, training=False))

    def time_predictions(self, count: int) -> list[float]:
        """Returns the milliseconds of each of `count` predictions for one example."""
        predict, x = self.predictor(), self.arrays["x"][:1]
        np.asarray(predict(x))
        return [1e3 * _secs(lambda: np.asarray(predict(x))) for _ in range(count)]

    def time_updates(self, count: int) -> float | None:
        """Returns the seconds of `count` updates alone.

        The weights serve as their gradients, which so are other ones each time.
        """
        return None


class Raw(System):
    """A hand-written loop: a tf.while in one tf.function, and a Keras optimizer."""

    def build(self) -> None:
        self.model, self.optimizer = self.make_model(), self.work.build_optimizer()
        if self.dynamic:
            self.optimizer = keras.optimizers.LossScaleOptimizer(self.optimizer)
        self.optimizer.build(self.model.trainable_variables)
        self._iterator = iter(self.dataset())
        self._loop = tf.function(self._train)
        self._update_loop = tf.function(self._update)

    def train(self, num_steps: int) -> None:
        self._loop(self._iterator, tf.constant(num_steps)).numpy()

    def step(self, x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        """Runs one step; returns the mean loss."""
        variables = self.model.trainable_variables
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(self.work.loss(y, self.model(x, training=True)))
            scaled_loss = self.optimizer.scale_loss(loss)
        self.optimizer.apply(tape.gradient(scaled_loss, variables), variables)
        return loss

    def _train(self, iterator: Any, num_steps: tf.Tensor) -> tf.Tensor:
        step = self.step
        if self.jit_compile:
            step = tf.function(step, jit_compile=True)
        loss = tf.constant(0.0)
        for _ in tf.range(num_steps):
            x, y = next(iterator)
            loss = step(x, y)
        return loss

    def _update(self, num_steps: tf.Tensor) -> None:
        for _ in tf.range(num_steps):
            variables = self.model.trainable_variables
            gradients = [tf.convert_to_tensor(variable) for variable in variables]
            self.optimizer.apply(gradients, variables)

    def time_updates(self, count: int) -> float | None:
        self._update_loop(tf.constant(1))
        return _secs(lambda: self._update_loop(tf.constant(count)))


class KerasFit(System):
    """`Model.fit`, with the number of steps per execution that is fastest here."""

    def build(self) -> None:
        self.model = self.make_model()
        optimizer = self.work.build_optimizer()
        if self.dynamic:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        jit = "auto" if self.jit_compile is None else self.jit_compile
        # auto_scale_loss would scale mixed_float16 where no scaling is asked for.
        self.model.compile(optimizer, self._mean_loss, jit_compile=jit,
                           auto_scale_loss=False)
        self.optimizer = self.model.optimizer
        self._data = self.dataset()
        self._functions: dict[int, Any] = {}  # traced, by steps of an execution

    def _mean_loss(self, y: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
        return self.work.loss(y, outputs)

    def train(self, num_steps: int) -> None:
        # An execution is never cut: what does not fill one goes step by step.
        rest = num_steps % self.steps_per_call
        self._fit(num_steps - rest, self.steps_per_call)
        self._fit(rest, 1)

    def _fit(self, num_steps: int, steps_per_execution: int) -> None:
        if num_steps:
            # `fit` begins the data anew each time.
            data = self._data.skip(self.steps % works.NUM_BATCHES)
            self.model.steps_per_execution = steps_per_execution
            self.model.train_function = self._functions.get(steps_per_execution)
            self.model.fit(data, steps_per_epoch=num_steps, verbose=0)
            self._functions[steps_per_execution] = self.model.train_function

    def prepare(self, num_steps: int) -> None:
        self._fit(num_steps, num_steps)
        self.steps += num_steps

    def settle(self, num_steps: int) -> None:
        if self.steps_per_call > 1 and num_steps % self.steps_per_call == 0:
            return
        whole = max(n for n in (1, 16, 64) if num_steps % n == 0)
        self.steps_per_call = min(
            {1, whole}, key=lambda n: self._secs_with(n, num_steps))

    def _secs_with(self, steps_per_execution: int, num_steps: int) -> float:
        self.steps_per_call = steps_per_execution
        self.run(num_steps)  # traced here
        return min(_secs(lambda: self.run(num_steps)) for _ in range(2))

    def predictor(self) -> Callable:
        return lambda x: self.model.predict(x, verbose=0)


class Orbit(Raw):
    """`orbit.StandardTrainer`, with the step of the hand-written loop."""

    def build(self) -> None:
        import orbit

        super().build()
        step, compiles = self.step, self.jit_compile

        class Trainer(orbit.StandardTrainer):
            def train_step(self, iterator):
                one = tf.function(step, jit_compile=True) if compiles else step
                tf.distribute.get_strategy().run(one, args=next(iterator))

        self._trainer = Trainer(self.dataset())

    def train(self, num_steps: int) -> None:
        self._trainer.train(tf.constant(num_steps))
        self.optimizer.iterations.numpy()


class Mpl(System):
    """`mpl.Experiment`, with its own pipeline and the blocks of its own trainer."""

    def build(self) -> None:
        import mpl

        system = self

        class Benchmark(mpl.Experiment):
            def build_data(self, split, context):
                return system.in_order() if split == "train" else None

            def build_model(self):
                return system.work.build_model()

            def build_optimizer(self, config):
                return system.work.build_optimizer()

            def loss(self, batch, training):
                outputs = self.model(batch["x"], training=training)
                losses = system.work.loss(batch["y"], outputs)
                weights = batch["weight"]
                if losses.shape.rank > 1:  # one a token
                    weights = tf.broadcast_to(
                        weights[:, tf.newaxis], losses.shape)
                return mpl.LossOutput(losses, weights)

            def predict(self, batch):
                return self.model(batch["x"], training=False)

        config = mpl.RunConfig(
            policy=self.policy, loss_scale="dynamic" if self.dynamic else "none",
            global_batch_size=self.work.batch_size, train_steps=10**9, seed=SEED,
            jit_compile="auto" if self.jit_compile is None else self.jit_compile,
        )
        self.experiment = Benchmark()
        self.set_up(config)
        self.model = self.experiment.model
        self._update: Any = None

    def set_up(self, config: Any) -> None:
        """Sets the experiment up on one device."""
        device = "GPU:0" if tf.config.list_physical_devices("GPU") else "CPU:0"
        self.experiment.setup(config, tf.distribute.OneDeviceStrategy(device))

    def in_order(self) -> works.Arrays:
        """Returns the arrays so that mpl's first epoch has the others' order."""
        count = self.work.num_examples
        key = tf.random.experimental.stateless_fold_in([0, SEED], 0)
        order = tf.random.experimental.index_shuffle(
            tf.range(count, dtype=tf.int64), key, tf.constant(count - 1, tf.int64))
        examples = {}
        for name, array in self.arrays.items():
            examples[name] = np.empty_like(array)
            examples[name][order.numpy()] = array
        return examples

    def train(self, num_steps: int) -> None:
        self.experiment.trainer.train(num_steps)
        self.experiment.global_step.numpy()

    def save(self, path: str) -> None:
        tf.train.Checkpoint(**self.experiment.checkpoint_objects()).write(path)

    def predictor(self) -> Callable:
        predict = self.experiment.predictor()
        return lambda x: predict({"x": x})

    def time_updates(self, count: int) -> float | None:
        run = self.experiment.strategy.run
        if self._update is None:
            self._update = self._make_update()
            run(self._update, args=(tf.constant(1),))
        return _secs(lambda: run(self._update, args=(tf.constant(count),)))

    def _make_update(self) -> Callable:
        import mpl

        weights, optimizer = self.experiment.weights, self.experiment.optimizer
        output = mpl.LossOutput(tf.ones([1]), tf.ones([1]))

        @tf.function
        def update(num_steps):
            for _ in tf.range(num_steps):
                params = weights.cast()
                with weights.bound(params) as forward:
                    optimizer.scale_loss(output, forward)
                # From one gradient a variable, as a tape gives them.
                parts = iter(forward.slices)
                gradients = [bucket.join([next(parts) for _ in bucket.entries])
                             for bucket in weights.buckets]
                optimizer.apply(gradients, forward)

        return update


SYSTEMS = {"mpl": Mpl, "raw": Raw, "keras_fit": KerasFit, "orbit": Orbit}


def _secs(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began
