"""What is trained in the benchmark: models with their data, loss and optimizer.

Each work is the same Keras model, with the same initial weights, for every system. Data
are random, sixteen batches of them; only the time and the agreement of losses count.
"""

import dataclasses
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from experiments.datasets import digits as digits_data
from experiments.models.convnet import convnet
from experiments.models.resnet import resnet

NUM_BATCHES = 16
Arrays = dict[str, np.ndarray]
layers = keras.layers


@dataclasses.dataclass(frozen=True)
class Work:
    """One thing to train.

    Attributes:
        about: what it is and what it is there to show.
        build_model: makes the Keras model, under the dtype policy of the run.
        make_data: makes `{"x": [n, ...], "y": [n, ...]}` for a given n.
        batch_size: examples in a step.
        optimizer: name of the Keras optimizer.
        loss: `loss(y, outputs)` gives a float32 loss per example, `[batch, ...]`.
        updates: whether the optimizer's update is also timed alone.
    """

    about: str
    build_model: Callable[[], keras.Model]
    make_data: Callable[[int], Arrays]
    batch_size: int
    optimizer: str = "Adam"
    loss: Callable = keras.losses.sparse_categorical_crossentropy
    updates: bool = False

    @property
    def num_examples(self) -> int:
        return NUM_BATCHES * self.batch_size

    def build_optimizer(self) -> keras.optimizers.Optimizer:
        """Returns a fresh optimizer with the rate 1e-3."""
        return getattr(keras.optimizers, self.optimizer)(1e-3)


def crossentropy(y: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Returns the cross entropy of integer classes and logits, `[batch, ...]`."""
    return keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True)


def _classes(shape: tuple[int, ...], num_classes: int = 10) -> Callable[[int], Arrays]:
    def make(count: int) -> Arrays:
        random = np.random.default_rng(0)
        return {"x": random.standard_normal((count, *shape), np.float32),
                "y": random.integers(0, num_classes, count, np.int32)}

    return make


def _dense(shape: int, *units: int) -> Callable[[], keras.Model]:
    def build() -> keras.Model:
        hidden = [layers.Dense(count, activation="relu") for count in units]
        return keras.Sequential(
            [keras.Input((shape,)), *hidden, layers.Dense(10, dtype="float32")])

    return build


class _Sum(keras.layers.Layer):
    """x · Σ of many small matrices, so that the update is nearly all the work."""

    def __init__(self, count: int):
        super().__init__()
        self.matrices = [self.add_weight(shape=(8, 8), name=f"matrix_{number}")
                         for number in range(count)]

    def call(self, x):
        total = tf.add_n([tf.convert_to_tensor(matrix) for matrix in self.matrices])
        return tf.matmul(x, total) / len(self.matrices) ** 0.5


def _small_variables(count: int) -> Callable[[], keras.Model]:
    def build() -> keras.Model:
        outputs = layers.Activation("linear", dtype="float32")
        return keras.Sequential([keras.Input((8,)), _Sum(count), outputs])

    return build


def _resnet20() -> keras.Model:
    return resnet(20, 10, projection=True)


def _resnet50() -> keras.Model:
    body = keras.applications.ResNet50(weights=None, classifier_activation=None)
    outputs = layers.Activation("linear", dtype="float32")(body.output)
    return keras.Model(body.input, outputs)


class _Block(keras.layers.Layer):
    """A causal transformer block with the normalisation first."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm_1, self.norm_2 = (layers.LayerNormalization() for _ in range(2))
        self.to_qkv, self.to_out = layers.Dense(3 * width), layers.Dense(width)
        self.up = layers.Dense(4 * width, activation="gelu")
        self.down = layers.Dense(width)

    def build(self, shape):
        for layer in (self.norm_1, self.norm_2, self.to_qkv, self.to_out, self.up):
            layer.build(shape)
        self.down.build((*shape[:-1], 4 * shape[-1]))

    def call(self, x):
        x = x + self.to_out(self._attend(self.to_qkv(self.norm_1(x))))
        return x + self.down(self.up(self.norm_2(x)))

    def _attend(self, qkv):
        _, length, width = qkv.shape
        heads = tf.reshape(qkv, [-1, length, 3, self.num_heads,
                                 width // 3 // self.num_heads])
        query, key, value = tf.unstack(tf.transpose(heads, [2, 0, 3, 1, 4]))
        scores = tf.matmul(query, key, transpose_b=True) * query.shape[-1] ** -0.5
        past = tf.linalg.band_part(tf.ones([length, length], tf.bool), -1, 0)
        scores = tf.where(past, tf.cast(scores, tf.float32), -1e9)
        mixed = tf.matmul(tf.cast(tf.nn.softmax(scores), value.dtype), value)
        return tf.reshape(tf.transpose(mixed, [0, 2, 1, 3]), [-1, length, width // 3])


def _gpt(
    depth: int, width: int, num_heads: int, length: int, vocabulary: int
) -> Callable[[], keras.Model]:
    def build() -> keras.Model:
        inputs = keras.Input((length,), dtype="int32")
        x = layers.Embedding(vocabulary, width)(inputs)
        for _ in range(depth):
            x = _Block(width, num_heads)(x)
        x = layers.Dense(vocabulary)(layers.LayerNormalization()(x))
        return keras.Model(inputs, layers.Activation("linear", dtype="float32")(x))

    return build


def _tokens(length: int, vocabulary: int) -> Callable[[int], Arrays]:
    def make(count: int) -> Arrays:
        random = np.random.default_rng(0)
        text = random.integers(0, vocabulary, (count, length + 1), np.int32)
        return {"x": text[:, :-1], "y": text[:, 1:]}

    return make


def _lstm() -> keras.Model:
    return keras.Sequential([
        keras.Input((32, 64)), layers.LSTM(256), layers.Dense(10, dtype="float32")])


def _recommender() -> keras.Model:
    inputs = keras.Input((4,), dtype="int32")
    x = layers.Flatten()(layers.Embedding(1_000_000, 32)(inputs))
    for units in (256, 128):
        x = layers.Dense(units, activation="relu")(x)
    return keras.Model(inputs, layers.Dense(1, dtype="float32")(x))


def _factorization() -> keras.Model:
    """Matrix factorization (Koren et al. 2009, doi:10.1109/MC.2009.263)."""
    inputs = keras.Input((2,), dtype="int32")
    user = layers.Embedding(200_000, 32)(inputs[:, 0])
    item = layers.Embedding(50_000, 32)(inputs[:, 1])
    score = layers.Dot(1, dtype="float32")([user, item])
    return keras.Model(inputs, score)


def _ids(*num_rows: int) -> Callable[[int], Arrays]:
    def make(count: int) -> Arrays:
        random = np.random.default_rng(0)
        # Few rows are asked for often, as in real catalogues.
        shares = random.power(0.3, (count, len(num_rows)))
        return {"x": (shares * num_rows).astype(np.int32),
                "y": random.integers(0, 2, (count, 1)).astype(np.float32)}

    return make


def _digits() -> keras.Model:
    return keras.Sequential([
        keras.Input((8, 8, 1)),
        layers.Rescaling(1 / 16),
        layers.Conv2D(32, 3, padding="same", activation="relu"),
        layers.Conv2D(64, 3, activation="relu"),
        layers.MaxPooling2D(),
        layers.Flatten(),
        layers.Dense(64, activation="relu"),
        layers.Dropout(0.3),
        layers.Dense(digits_data.NUM_CLASSES, dtype="float32"),
    ])


def _digits_data(count: int) -> Arrays:
    examples = digits_data.load("train")
    return {"x": examples["image"][:count], "y": examples["label"][:count]}


def binary_crossentropy(y: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Returns the cross entropy of labels 0 or 1 and logits, `[batch]`."""
    return keras.losses.binary_crossentropy(y, logits, from_logits=True)


def _updates(count: int) -> Work:
    about = f"{count} variables of 8×8: what the update costs for each"
    return Work(about, _small_variables(count), _classes((8,), 8), 32, "Adam",
                crossentropy, updates=True)


WORKS = {
    "tiny": Work("MLP 32-64-10: the loop's own cost", _dense(32, 64),
                 _classes((32,)), 32, loss=crossentropy),
    "deep": Work("151 dense layers of 16: 302 variables", _dense(16, *[16] * 150),
                 _classes((16,)), 32, loss=crossentropy),
    "vars10": _updates(10),
    "vars100": _updates(100),
    "vars1000": _updates(1000),
    "mlp": Work("MLP 784-1024-1024-10", _dense(784, 1024, 1024),
                _classes((784,)), 256, loss=crossentropy),
    "cnn": Work("CNN 32-64-64 on 28×28", convnet, _classes((28, 28, 1)), 64,
                loss=crossentropy),
    "resnet": Work("ResNet-20 on 32×32", _resnet20, _classes((32, 32, 3)), 64,
                   loss=crossentropy),
    "gpt": Work("GPT 4×256 on 64 tokens", _gpt(4, 256, 4, 64, 256),
                _tokens(64, 256), 16, loss=crossentropy),
    "lstm": Work("LSTM 256 on 32 steps of 64", _lstm, _classes((32, 64)), 32,
                 loss=crossentropy),
    "recommender": Work("embedding of 10⁶ rows, MLP", _recommender,
                        _ids(*[1_000_000] * 4), 1024, "Adagrad", binary_crossentropy),
    "mf": Work("matrix factorization, 200,000 × 50,000", _factorization,
               _ids(200_000, 50_000), 1024, "Adagrad", binary_crossentropy),
    # For a GPU: sizes that fill the chip.
    "resnet50": Work("ResNet-50 on 224×224", _resnet50,
                     _classes((224, 224, 3), 1000), 256, loss=crossentropy),
    "gpt_large": Work("GPT 12×1024 on 1,024 tokens", _gpt(12, 1024, 16, 1024, 32_768),
                      _tokens(1024, 32_768), 16, loss=crossentropy),
    # For the time from the start to the first step.
    "digits": Work("the model of experiments.digits", _digits, _digits_data, 64,
                   loss=crossentropy),
}
DEFAULT = ("tiny", "deep", "mlp", "cnn", "gpt")
FULL = (*DEFAULT, "vars10", "vars100", "vars1000", "resnet", "lstm", "recommender",
        "mf")
