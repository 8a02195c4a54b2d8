"""A causal transformer on plain TensorFlow: its dtypes are cast by hand."""

import keras
import numpy as np
import tensorflow as tf

import mpl


class Norm(tf.Module):
    """Layer normalisation of the last axis, computed in the dtype of outputs."""

    def __init__(self, width: int, policy: mpl.Policy):
        super().__init__()
        self.policy = policy
        self.gain = tf.Variable(policy.cast_to_param(tf.ones([width])))
        self.bias = tf.Variable(policy.cast_to_param(tf.zeros([width])))

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        x = self.policy.cast_to_output(x)
        mean, variance = tf.nn.moments(x, -1, keepdims=True)
        x = self.policy.cast_to_compute((x - mean) * tf.math.rsqrt(variance + 1e-5))
        return x * self.gain + self.bias


class Block(tf.Module):
    """Attention to what came before, then a layer for each position alone.

    Args:
        width: of the activations.
        num_heads: divides the width.
        stddev: of the weights that write into the activations.
        policy: whose dtypes are used.
    """

    def __init__(self, width: int, num_heads: int, stddev: float, policy: mpl.Policy):
        super().__init__()
        self.policy, self.num_heads = policy, num_heads
        self.norm_1, self.norm_2 = Norm(width, policy), Norm(width, policy)
        self.to_qkv = weights(policy, width, 3 * width)
        self.to_out = weights(policy, width, width, stddev=stddev)
        self.up = weights(policy, width, 4 * width)
        self.up_bias = tf.Variable(policy.cast_to_param(tf.zeros([4 * width])))
        self.down = weights(policy, 4 * width, width, stddev=stddev)
        self.down_bias = tf.Variable(policy.cast_to_param(tf.zeros([width])))

    def __call__(
        self, x: tf.Tensor, drop: keras.layers.Layer, training: bool
    ) -> tf.Tensor:
        x += drop(self.attend(self.norm_1(x)), training=training)
        hidden = tf.nn.gelu(_product(self.norm_2(x), self.up) + self.up_bias)
        hidden = _product(hidden, self.down) + self.down_bias
        return x + drop(hidden, training=training)

    def attend(self, x: tf.Tensor) -> tf.Tensor:
        """Mixes the positions up to each one, head by head."""
        _, length, width = x.shape
        size = width // self.num_heads
        heads = tf.reshape(
            _product(x, self.to_qkv), [-1, length, 3, self.num_heads, size])
        query, key, value = tf.unstack(tf.transpose(heads, [2, 0, 3, 1, 4]))
        scores = self.policy.cast_to_output(
            tf.matmul(query * size**-0.5, key, transpose_b=True))
        past = np.tri(length, dtype=bool)
        shares = tf.nn.softmax(tf.where(past, scores, scores.dtype.min))
        mixed = tf.matmul(self.policy.cast_to_compute(shares), value)
        mixed = tf.reshape(tf.transpose(mixed, [0, 2, 1, 3]), [-1, length, width])
        return _product(mixed, self.to_out)


class Gpt(tf.Module):
    """Logits of what follows each position, from what stands before:

        x = table[ids] + positions
        for block in blocks:
            x += attention(norm(x))
            x += layer(norm(x))
        logits = norm(x) table^T

    Its variables are read in the compute dtype while they are bound; what is not a
    variable it casts itself.

    Args:
        vocabulary: number of different ids.
        length: positions of an input.
        depth: blocks.
        width: of the activations.
        num_heads: divides the width.
        dropout: share of what a block adds that is left out in training.
        policy: whose dtypes are used.

    Source: Radford et al. 2019, Language Models are Unsupervised Multitask Learners,
    section 2.3 (normalisation first, smaller weights where blocks write); Press and
    Wolf 2017, https://arxiv.org/abs/1608.05859 (one table for input and output).
    """

    def __init__(
        self, *, vocabulary: int, length: int, depth: int, width: int, num_heads: int,
        dropout: float, policy: mpl.Policy,
    ):
        super().__init__(name="gpt")
        self.policy, self.vocabulary = policy, vocabulary
        self.table = weights(policy, vocabulary, width)
        self.positions = weights(policy, length, width)
        # Two branches a block add to the activations.
        stddev = 0.02 * (2 * depth) ** -0.5
        self.blocks = [Block(width, num_heads, stddev, policy) for _ in range(depth)]
        self.norm = Norm(width, policy)
        self.drop = keras.layers.Dropout(dropout)  # its seed is state of the model

    def __call__(self, ids: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Returns logits `[batch, length, vocabulary]` of ids `[batch, length]`."""
        # Not a lookup: its gradient would be summed in 16 bits, id by id.
        chosen = self.policy.cast_to_compute(tf.one_hot(ids, self.vocabulary))
        x = _product(chosen, self.table) + self.positions[:ids.shape[1]]
        x = self.drop(x, training=training)
        for block in self.blocks:
            x = block(x, self.drop, training)
        logits = tf.tensordot(self.norm(x), self.table, [[2], [1]])
        return self.policy.cast_to_output(logits)


def weights(policy: mpl.Policy, *shape: int, stddev: float = 0.02) -> tf.Variable:
    """Returns normally distributed weights in the dtype of parameters."""
    initial = keras.initializers.RandomNormal(stddev=stddev)(shape)
    return tf.Variable(policy.cast_to_param(initial))


def _product(x: tf.Tensor, matrix: tf.Tensor) -> tf.Tensor:
    return tf.tensordot(x, matrix, 1)
