"""How well probabilities rank: metrics that look at each label and average over them.

They count scores in equal steps of log odds, not of probability as Keras's do, so that
confident predictions, which are all near 0 or 1, do not fall together. They are NaN
once a probability was no number from 0 to 1.
"""

import keras
import numpy as np
import tensorflow as tf

BINS = 1000
_EPSILON = 1e-7  # probabilities below are not told apart
_LARGEST = 16.2  # log odds of 1 - 1e-7


class _Ranking(keras.metrics.Metric):
    """Counts of negatives and positives by score.

    Args:
        num_labels: labels of an example, or classes one of which is its own.
    """

    def __init__(self, num_labels: int, name: str | None = None):
        super().__init__(name=name)
        self.counts = self.add_variable((2, BINS, num_labels), "zeros", name="counts")

    def update_state(self, label, probability, sample_weight=None):
        """Adds examples.

        Args:
            label: 0 or 1, of any dtype, `[batch, num_labels]`.
            probability: float32 `[batch, num_labels]`.
            sample_weight: `[batch]`.
        """
        odds = tf.math.log(probability + _EPSILON)
        odds -= tf.math.log(1.0 - probability + _EPSILON)
        bins = tf.cast((odds / _LARGEST + 1.0) / 2.0 * BINS, tf.int32)
        bins = tf.clip_by_value(bins, 0, BINS - 1)
        num_labels = self.counts.shape[-1]
        place = (tf.cast(label, tf.int32) * BINS + bins) * num_labels
        place += tf.range(num_labels)
        weights = tf.ones_like(probability)
        if sample_weight is not None:
            weights *= tf.cast(sample_weight, weights.dtype)[:, tf.newaxis]
        bad = (weights > 0) & ~tf.math.is_finite(odds)
        weights = tf.where(bad, np.nan, weights)
        size = 2 * BINS * num_labels
        counts = tf.math.unsorted_segment_sum(weights, place, size)
        self.counts.assign_add(tf.reshape(counts, self.counts.shape))

    def _average(self, values: tf.Tensor) -> tf.Tensor:
        """Returns the mean over the labels of which both kinds were seen, or 0."""
        counts = tf.convert_to_tensor(self.counts)
        both = tf.reduce_all(tf.reduce_sum(counts, 1) > 0, 0)
        total = tf.reduce_sum(tf.where(both, values, 0.0))
        mean = tf.math.divide_no_nan(total, tf.reduce_sum(tf.cast(both, total.dtype)))
        known = tf.reduce_all(tf.math.is_finite(counts))
        return tf.where(known, mean, np.nan)


class AUC(_Ranking):
    """The area under the ROC curve: how often a positive scores above a negative.

    A pair in the same bin counts half.
    """

    def result(self):
        """Returns the mean over labels, float32."""
        negative, positive = tf.unstack(tf.convert_to_tensor(self.counts))
        below = tf.cumsum(negative, exclusive=True)
        pairs = tf.reduce_sum(negative, 0) * tf.reduce_sum(positive, 0)
        above = tf.reduce_sum(positive * (below + negative / 2.0), 0)
        return self._average(tf.math.divide_no_nan(above, pairs))


class SensitivityAtSpecificity(_Ranking):
    """The largest share of positives found where few negatives are taken for them.

    Args:
        num_labels: as above.
        specificity: least share of negatives that must be told as such.
    """

    def __init__(self, num_labels: int, specificity: float, name: str | None = None):
        super().__init__(num_labels, name)
        self.specificity = specificity

    def result(self):
        """Returns the mean over labels, each at its own threshold, float32."""
        negative, positive = tf.unstack(tf.convert_to_tensor(self.counts))

        def share(counts: tf.Tensor, **order: bool) -> tf.Tensor:
            return tf.math.divide_no_nan(
                tf.cumsum(counts, **order), tf.reduce_sum(counts, 0))

        found = share(positive, reverse=True)  # with each bin as the threshold
        told = share(negative, exclusive=True)
        allowed = tf.where(told >= self.specificity, found, 0.0)
        return self._average(tf.reduce_max(allowed, 0))
