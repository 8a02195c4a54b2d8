"""BERT: an encoder of sequences of word pieces, with heads for its tasks.

Sources: Devlin et al. 2018, https://arxiv.org/abs/1810.04805; Vaswani et al. 2017,
https://arxiv.org/abs/1706.03762. Normalisation comes after each sum, as in both.
"""

from collections.abc import Mapping, Sequence

import keras
import tensorflow as tf

layers = keras.layers


def _dense(hidden: int, units: int, **kwargs) -> keras.layers.Dense:
    return layers.Dense(units, kernel_initializer=_initial(hidden), **kwargs)


def _initial(hidden: int) -> keras.initializers.Initializer:
    """BERT's 0.02 at its base's width; narrow ones learn sooner from larger weights."""
    return keras.initializers.TruncatedNormal(stddev=0.02 * (768 / hidden)**0.5)


def _norm() -> keras.layers.LayerNormalization:
    return layers.LayerNormalization(epsilon=1e-12)


class Block(keras.layers.Layer):
    """Attention to the whole sequence, then two dense layers, each added to its input.

        x = norm(x + dropout(attention(x)))
        x = norm(x + dropout(down(gelu(up(x)))))

    Args:
        hidden: width.
        heads: of the attention; they divide `hidden`.
        dropout: share of what is left out in training.
    """

    def __init__(self, hidden: int, heads: int, dropout: float, **kwargs):
        super().__init__(**kwargs)
        self.hidden, self.heads = hidden, heads
        self.to_qkv, self.to_out = _dense(hidden, 3 * hidden), _dense(hidden, hidden)
        self.up = _dense(hidden, 4 * hidden, activation="gelu")
        self.down = _dense(hidden, hidden)
        self.norm_1, self.norm_2 = _norm(), _norm()
        self.drop = layers.Dropout(dropout)

    def build(self, shape: Sequence[int | None] = ()) -> None:
        inputs = (None, None, self.hidden)
        for layer in (self.to_qkv, self.to_out, self.norm_1, self.up, self.norm_2):
            layer.build(inputs)
        self.down.build((None, None, 4 * self.hidden))

    def call(self, x, real, training=None):
        added = self.to_out(self._attend(self.to_qkv(x), real, training))
        x = self.norm_1(x + self.drop(added, training=training))
        added = self.down(self.up(x))
        return self.norm_2(x + self.drop(added, training=training))

    def _attend(self, qkv, real, training):
        length, size = qkv.shape[1], self.hidden // self.heads
        parts = tf.reshape(qkv, [-1, length, 3, self.heads, size])
        query, key, value = tf.unstack(tf.transpose(parts, [2, 0, 3, 1, 4]))
        scores = tf.matmul(query * size**-0.5, key, transpose_b=True)
        scores = tf.where(
            real[:, tf.newaxis, tf.newaxis, :] > 0, tf.cast(scores, tf.float32), -1e9)
        chances = tf.cast(tf.nn.softmax(scores), value.dtype)
        mixed = tf.matmul(self.drop(chances, training=training), value)
        return tf.reshape(tf.transpose(mixed, [0, 2, 1, 3]), [-1, length, self.hidden])


class Encoder(keras.layers.Layer):
    """Word pieces, their places and their segments, through blocks.

    Args:
        vocabulary: number of word pieces.
        positions: longest sequence.
        depth: number of blocks.
        hidden, heads, dropout: as of `Block`.
    """

    def __init__(
        self, vocabulary: int, positions: int, depth: int, hidden: int, heads: int,
        dropout: float, **kwargs,
    ):
        super().__init__(**kwargs)
        self.hidden = hidden
        self.words, self.places, self.segments = (
            layers.Embedding(
                rows, hidden, embeddings_initializer=_initial(hidden), name=name)
            for name, rows in (
                ("words", vocabulary), ("places", positions), ("segments", 2)))
        self.norm, self.drop = _norm(), layers.Dropout(dropout)
        self.blocks = [Block(hidden, heads, dropout, name=f"block_{number}")
                       for number in range(depth)]
        for block in self.blocks:  # checkpoints hold attributes, and not lists
            setattr(self, block.name, block)

    def build(self, shape: Sequence[int | None] = ()) -> None:
        for layer in (self.words, self.places, self.segments, *self.blocks):
            layer.build()
        self.norm.build((None, None, self.hidden))

    def call(self, ids, real, segments, training=None):
        places = self.places(tf.range(ids.shape[1]))
        x = self.norm(self.words(ids) + places + self.segments(segments))
        x = self.drop(x, training=training)
        for block in self.blocks:
            x = block(x, real, training=training)
        return x


class MaskedWords(keras.layers.Layer):
    """Logits of all word pieces at some places, by the encoder's own table of words."""

    def __init__(self, vocabulary: int, hidden: int, **kwargs):
        super().__init__(**kwargs)
        self.vocabulary, self.hidden = vocabulary, hidden
        self.transform = _dense(hidden, hidden, activation="gelu")
        self.norm = _norm()

    def build(self, shape: Sequence[int | None] = ()) -> None:
        self.transform.build((None, None, self.hidden))
        self.norm.build((None, None, self.hidden))
        self.bias = self.add_weight(
            shape=(self.vocabulary,), initializer="zeros", name="bias")

    def call(self, x, positions, table):
        # As a product: of fixed shapes also in the backward pass, and fast on a TPU.
        at = tf.one_hot(positions, x.shape[1], dtype=x.dtype)
        x = self.norm(self.transform(tf.matmul(at, x)))
        x = tf.reshape(x, [-1, self.hidden])
        logits = tf.cast(tf.matmul(x, table, transpose_b=True), tf.float32)
        logits += tf.cast(self.bias, tf.float32)
        return tf.reshape(logits, [-1, positions.shape[1], self.vocabulary])


class Bert(keras.layers.Layer):
    """The encoder with heads; float32 logits by the name of the head.

    Args:
        masked_words: whether it names masked words: logits `words`
            `[batch, places, vocabulary]`.
        classes: number of classes by the name of a head that judges whole sequences:
            logits `[batch, classes]`.
        **sizes: arguments of `Encoder`.
    """

    def __init__(self, *, masked_words: bool, classes: Mapping[str, int], **sizes):
        super().__init__(name="bert")
        hidden, dropout = sizes["hidden"], sizes["dropout"]
        self.encoder = Encoder(name="encoder", **sizes)
        self.masked_words: MaskedWords | None = None
        if masked_words:
            self.masked_words = MaskedWords(
                sizes["vocabulary"], hidden, name="masked_words")
        self.judges = [_dense(hidden, count, name=name, dtype="float32")
                       for name, count in classes.items()]
        if self.judges:
            self.pooler = _dense(hidden, hidden, activation="tanh", name="pooler")
            self.drop = layers.Dropout(dropout)
        for judge in self.judges:
            setattr(self, judge.name, judge)

    def build(self, shape: Sequence[int | None] = ()) -> None:
        self.encoder.build()
        if self.masked_words is not None:
            self.masked_words.build()
        for layer in (self.pooler, *self.judges) if self.judges else ():
            layer.build((None, self.encoder.hidden))

    def call(self, ids, real, segments, positions=None, training=None):
        """Returns the logits of each head.

        Args:
            ids: word pieces, int `[batch, length]`.
            real: 1, and 0 for padding, int `[batch, length]`.
            segments: 0 for the first text, 1 for the second, int `[batch, length]`.
            positions: places of masked words, int `[batch, places]`, for that head.
            training: whether dropout acts.
        """
        x = self.encoder(ids, real, segments, training=training)
        logits = dict[str, tf.Tensor]()
        if self.masked_words is not None:
            table = keras.ops.convert_to_tensor(self.encoder.words.embeddings)
            logits["words"] = self.masked_words(x, positions, tf.cast(table, x.dtype))
        if self.judges:
            pooled = self.drop(self.pooler(x[:, 0]), training=training)
            logits |= {judge.name: judge(pooled) for judge in self.judges}
        return logits
