"""What a researcher subclasses: a model, an optimizer, data and a loss."""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from mpl import data as data_lib
from mpl import distribute, errors, inference, record
from mpl import experiment_data as data_of
from mpl import experiment_loops as loops
from mpl.loop.inner_loop import converted
from mpl.precision import loss_scale as loss_scale_lib
from mpl.precision import policy as policy_lib
from mpl.step import binding as binding_lib
from mpl.step import gradients as gradients_lib
from mpl.step import keras_optimizer
from mpl.step import loss_scale_optimizer as optimizer_lib
from mpl.step import master_weights as master_weights_lib
from mpl.step import metrics as metrics_lib
from mpl.step import state as state_lib


class Experiment:
    """A model, its optimizer, its data and its loss; the rest has defaults.

    Write `build_model`, `build_data` and `loss`, and where wanted `build_optimizer`,
    `metrics` and `predict`. A new kind of loop overrides `train_step` alone. With
    several models `build_model` returns a dict; `weights` and `optimizer` are then
    dicts with the same keys, and the optimizers share one loss scale.

    Attributes:
      Config: the settings, a subclass of `RunConfig`; None: `RunConfig` itself.
      images: a method, where wanted: `images(batch)` returns images to show after each
        evaluation by name, `[n, height, width, channels]` in uint8 or floats in [0, 1];
        of the first 16 examples, for which it may call `predict`.
      policy_overrides: from pattern of a layer's path to the name of its policy.
      ranges: the lowest and the highest value allowed, by the name of a feature or
        label: `{"label": (0, 9)}`. Floats must be finite anyway.
      accumulates: whether a `train_step` of its own heeds `config.accumulate_steps`.
      config, strategy, policy, model, weights, optimizer, loss_scale: made by `setup`.
      global_step: int64 variable, attempted steps.
      train_steps: length of the training in steps.
      peers: the processes that train in step with this one; set before `setup`.
      shard: which part of each global batch this worker trains on.
    """

    Config: Any = None
    images: Any = None
    policy_overrides: Mapping[str, str] = {}
    ranges: data_lib.Ranges = {}
    accumulates = False
    peers = distribute.Peers()

    # What a researcher writes.

    def build_model(self) -> Any:
        """Returns a built Keras model or tf.Module, or a dict of them by name.

        Called once under the policy, the strategy and the seed of the run.
        """
        raise NotImplementedError(f"{type(self).__name__}.build_model")

    def build_data(self, split: str, context: data_lib.DataContext) -> Any:
        """Returns the examples of "train", "validation" or "test"; None: no such split.

        It is asked in this order.
        They are a dict of NumPy arrays by name, a tf.data.Dataset of dicts, one example
        an element, or a source: `mpl.ArraySource`, `mpl.DatasetSource`, or
        `mpl.FileSource`, which shuffles files and goes on in the middle of them.
        """
        raise NotImplementedError(f"{type(self).__name__}.build_data")

    def loss(self, batch: Mapping[str, tf.Tensor], training: bool) -> Any:
        """Returns the `LossOutput` of this replica's part of a batch.

        Args:
          batch: what `build_data` gave, `[batch, ...]`, and `weight`, float32
            `[batch]`.
          training: whether a step follows.
        """
        raise NotImplementedError(f"{type(self).__name__}.loss")

    def metrics(self) -> Mapping[str, keras.metrics.Metric]:
        """Returns fresh Keras metrics by name; they read `LossOutput.outputs`."""
        return {}

    def predict(self, batch: Mapping[str, tf.Tensor]) -> Any:
        """Returns predictions `[batch, ...]` for a batch without labels."""
        raise errors.ConfigError(
            f"{type(self).__name__} has no `predict`.",
            "Define `predict(self, batch)`; it returns what the model says of a batch.",
        )

    def read_input(self, path: str) -> Iterable[Mapping[str, np.ndarray]] | None:
        """Returns the examples in a file or folder, to predict them.

        They are dicts of arrays `[n, ...]`, as the training data but for labels. Those
        of more examples than a batch has are cut.

        Args:
          path: what `--input` says; it exists.

        Returns:
          Any iterable; None: mpl reads it, as an .npz file of arrays, or as images.
        """
        return None

    def from_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """Returns the pixels of an image file in the range of the training data.

        Args:
          pixels: uint8 `[height, width, channels]`, 0 to 255, of the size trained on.
        """
        return pixels

    def build_optimizer(self, config: Any) -> keras.optimizers.Optimizer:
        """Returns the inner Keras optimizer, from the flags by default."""
        return keras_optimizer.make_optimizer(
            config.optimizer,
            learning_rate=config.learning_rate,
            lr_schedule=config.lr_schedule,
            warmup_steps=config.warmup_steps,
            train_steps=self.train_steps,
            weight_decay=config.weight_decay,
        )

    def build_weights(self, model: Any) -> master_weights_lib.MasterWeights:
        """Returns the master weights of a model, with groups where wanted."""
        return master_weights_lib.MasterWeights(
            model, self.policy, bucket_mb=self.config.bucket_mb)

    @tf.autograph.experimental.do_not_convert
    def train_step(self, iterator: Any) -> None:
        """Runs one step on every replica; cross-replica context, in a tf.function."""

        def replica_step(batch: Mapping[str, tf.Tensor]) -> None:
            params = self.weights.cast()  # float32 masters -> compute copies

            def replica_forward(batch, state):
                with tf.GradientTape() as tape:
                    tape.watch(params)
                    with self.weights.bound(params, state) as forward:
                        output = converted(self.loss)(batch, training=True)
                        scaled_loss = self.optimizer.scale_loss(output, forward)
                gradients = self.weights.gradients(tape, scaled_loss, forward)
                return gradients, forward, output

            gradients, forward, output = gradients_lib.accumulate(
                replica_forward, batch, self.config.accumulate_steps,
                weights=self.weights)
            self.optimizer.apply(gradients, forward)  # reduce, check, update or skip
            self.update_metrics(output, forward)

        self.strategy.run(self.compiled(replica_step), args=(next(iterator),))

    @tf.autograph.experimental.do_not_convert
    def eval_step(self, iterator: Any) -> None:
        """Evaluates one batch on every replica."""

        def replica_step(batch: Mapping[str, tf.Tensor]) -> None:
            with self.bound_for_inference():
                output = converted(self.loss)(batch, training=False)
            self.update_metrics(output)

        self.strategy.run(self.compiled(replica_step), args=(next(iterator),))

    # What those methods may call.

    def update_metrics(
        self,
        output: state_lib.LossOutput,
        forward: state_lib.Forward | None = None,
    ) -> None:
        """Adds a batch to the metrics of training (with `forward`) or evaluation."""
        metrics = self.eval_metrics if forward is None else self.train_metrics
        metrics.update(output, forward)

    @contextlib.contextmanager
    def bound_for_inference(self) -> Iterator[None]:
        """The models read their averages, or their masters where the run keeps none."""
        with contextlib.ExitStack() as stack:
            for optimizer in tf.nest.flatten(self.optimizer):
                params = optimizer.weights.cast(optimizer.averages)
                stack.enter_context(optimizer.weights.bound(params))
            yield

    def compiled(self, function: Callable) -> Callable:
        """Returns the function under XLA, if the run asks for it."""
        if not self._jit_compile and "compiled" not in self.trainer.variant:
            return function
        status = tf.__internal__.autograph.control_status_ctx().status
        own = status.name == "ENABLED"  # AutoGraph rewrites a `train_step` of a user's
        return tf.function(function, autograph=own, jit_compile=True)

    # What `run` calls.

    @property
    def name(self) -> str:
        """The name of the experiment: that of the class, in snake_case."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()

    def setup(self, config: Any, strategy: tf.distribute.Strategy) -> None:
        """Makes everything a run needs; reads data, writes nothing, restores nothing.

        Raises:
          ConfigError: if the settings, the model or the data cannot work together.
        """
        self.config, self.strategy = config, strategy
        peers = self.peers
        self.shard = {"shard": peers.rank, "num_shards": peers.size}
        replicas = strategy.num_replicas_in_sync
        if isinstance(strategy, tf.distribute.ParameterServerStrategy):
            distribute.check_server_settings(config, replicas)
        distribute.check_batch(
            config.global_batch_size, replicas, config.accumulate_steps
        )
        own_step = type(self).train_step is not Experiment.train_step
        if config.accumulate_steps > 1 and own_step and not self.accumulates:
            raise errors.ConfigError(
                f"`accumulate_steps` ({config.accumulate_steps}) has no effect on "
                f"{type(self).__name__}.train_step.",
                "Use mpl.accumulate in it, and set `accumulates = True` in the class.",
            )
        self._jit_compile = _use_xla(config.jit_compile, replicas)
        with strategy.scope():  # `auto` asks whether it is a TPU's
            self.policy = policy_lib.get_policy(config.policy, self.policy_overrides)
        name = loss_scale_lib.resolved(config.loss_scale, self.policy)
        if config.on_nonfinite == "stop" and name == "dynamic":
            raise errors.ConfigError(
                f"`on_nonfinite` (stop) does not go with `loss_scale` "
                f"({config.loss_scale}), which under {self.policy.name} is dynamic: it "
                "finds its scale by steps that overflow.",
                "Use --loss_scale=1024, --policy=mixed_bfloat16, or skip.",
            )
        self.pipelines = data_of.build_pipelines(self)
        self.num_examples = {n: each.num_examples for n, each in self.pipelines.items()}
        self.batches_per_epoch = self.pipelines["train"].batches_per_epoch
        self.train_steps = data_of.resolve_train_steps(config, self.batches_per_epoch)
        if peers.size > 1:  # before the first variable, which workers send each other
            peers.agree({
                f"{split} data, {name}": value
                for split, pipeline in self.pipelines.items()
                for name, value in data_lib.fingerprint(pipeline).items()})
        keras.utils.set_random_seed(config.seed)
        with strategy.scope():
            self.build()
            self.loss_scale = loss_scale_lib.get_loss_scale(
                config.loss_scale, self.policy)
            self.optimizer = tf.nest.map_structure(self._wrap_optimizer, self.weights)
            self.train_metrics = metrics_lib.Metrics(self.metrics())
            self.eval_metrics = metrics_lib.Metrics(self.metrics())
        # Outside the scope: the host counts steps, not the replicas.
        self.global_step = tf.Variable(0, dtype=tf.int64, trainable=False)
        self.trainer = loops.ExperimentTrainer(self)
        self.evaluators = {
            split: loops.ExperimentEvaluator(self, split)
            for split in data_of.SPLITS[1:] if split in self.pipelines
        }
        if peers.size > 1:
            self._check_saving()

    def _check_saving(self) -> None:
        """The chief saves alone: no variable may need the others to be read."""
        everything = tf.train.Checkpoint(**self.checkpoint_objects())
        for part in tf.train.TrackableView(everything).descendants():
            variable = part.value if isinstance(part, keras.Variable) else part
            kind = getattr(variable, "synchronization", None)
            if kind == tf.VariableSynchronization.ON_READ and (
                    variable.aggregation != tf.VariableAggregation.ONLY_FIRST_REPLICA):
                raise errors.ConfigError(
                    f"`{variable.name}` of the model has synchronization ON_READ: all "
                    "processes would have to read it, and the chief saves alone.",
                    "Leave `synchronization` out, or make it a metric: return what it "
                    "counts in `LossOutput.outputs`.")

    def build(self) -> None:
        """Makes the model and its weights under `self.policy`."""
        with self.policy.scope():
            self.model = self.build_model()
        self.policy.apply_overrides([
            layer for model in tf.nest.flatten(self.model)
            for layer in binding_lib.flatten_layers(model)])
        self.weights = tf.nest.map_structure(self.build_weights, self.model)
        names = [e.name for w in tf.nest.flatten(self.weights) for e in w.entries]
        values = [e.value for w in tf.nest.flatten(self.weights) for e in w.entries]
        for number, value in enumerate(values):
            if any(value is other for other in values[:number]):
                raise errors.ConfigError(
                    f"{names[number]!r} belongs to two of the models; each would train "
                    "a copy of its own.",
                    "Put the shared layers in one model, or make the two one model.",
                )

    def _wrap_optimizer(
        self, weights: master_weights_lib.MasterWeights
    ) -> optimizer_lib.LossScaleOptimizer:
        gradients_lib.check_accumulation(weights.model, self.config.accumulate_steps)
        return optimizer_lib.LossScaleOptimizer(
            self.build_optimizer(self.config), self.loss_scale, weights,
            clip_norm=self.config.clip_norm,
            ema_decay=self.config.ema_decay,
            nominal_weight=self.config.global_batch_size,
            reduce_dtype=self.config.reduce_dtype,
        )

    def checkpoint_objects(self) -> dict[str, Any]:
        """Returns all that a checkpoint must hold, by name."""
        objects: dict[str, Any] = {"global_step": self.global_step,
                                   "position": self.trainer.position}
        for kind, value in (("model", self.model), ("optimizer", self.optimizer)):
            named = value if isinstance(value, Mapping) else {"": value}
            for name, part in named.items():
                objects[f"{kind}_{name}" if name else kind] = part
        return objects

    def after_restore(self) -> None:
        """Takes up what a checkpoint gave the model's variables and the position."""
        for weights in tf.nest.flatten(self.weights):
            weights.adopt()
        self.trainer.reset_iterator()

    def init_from(self, path: str) -> str:
        """Takes the weights of a checkpoint where they fit; returns a report.

        Raises:
          ConfigError, CheckpointError: see `mpl.record.init_from`.
        """
        models = {name: part for name, part in self.checkpoint_objects().items()
                  if name.partition("_")[0] == "model"}
        report = record.init_from(path, models)
        self.after_restore()
        for optimizer in tf.nest.flatten(self.optimizer):
            for average, bucket in zip(optimizer.averages, optimizer.buckets):
                average.assign(bucket.variable)
        return report

    def require_finite(self) -> None:
        """Raises NonFiniteError if a weight is NaN or infinite."""
        for bucket in [b for w in tf.nest.flatten(self.weights) for b in w.buckets]:
            values = tf.convert_to_tensor(bucket.variable)
            if tf.reduce_all(tf.math.is_finite(values)):
                continue
            for entry, part in zip(bucket.entries, bucket.split(values)):
                if not tf.reduce_all(tf.math.is_finite(part)):
                    raise errors.NonFiniteError(
                        f"After step {int(self.global_step)} {entry.name!r} is not "
                        "finite; it is not saved.",
                        "Lower the learning rate, and go on from the last checkpoint.",
                    )

    def train_report(self) -> dict[str, Any]:
        """Returns loss, metrics and the state of the optimizer since the last reset."""
        report = self.train_metrics.result()
        first = tf.nest.flatten(self.optimizer)[0]
        report["loss_scale"] = float(self.loss_scale.value)
        for name in ("applied_steps", "skipped_steps"):
            report[name] = int(getattr(first, name))
        for name in ("grad_norm", "learning_rate"):
            report[name] = float(getattr(first, name))
        return report

    def headline(self) -> str:
        """Returns the name of the metric that sums up the experiment."""
        return next(iter(self.eval_metrics.metrics), "loss")

    def predictor(self) -> Callable[[Mapping[str, np.ndarray]], Any]:
        """Returns a function from a dict of `[n, ...]` to predictions `[n, ...]`.

        The weights are those of each call: averages where the run keeps them.
        """
        return inference.predictor(self)

    def export(self, path: str, weights_dtype: str = "float32") -> str:
        """Writes a SavedModel of `predict` with the weights of this moment.

        Args:
          path: folder to write.
          weights_dtype: "float32": weights and computation in float32; "compute": both
            as in training, the weights stored in the compute dtype.

        Returns:
          The path.
        """
        return inference.export(self, path, weights_dtype)


def _use_xla(jit_compile: bool | str, replicas: int) -> bool:
    """The rule of --jit_compile; auto compiles nothing until a trial says so."""
    if jit_compile == "auto":
        return False
    if jit_compile and replicas > 1:
        raise errors.ConfigError(
            f"`jit_compile` (true) does not go with {replicas} replicas: their "
            "reduction cannot be compiled with the step.",
            "Use --jit_compile=auto, or one device.",
        )
    return bool(jit_compile)
