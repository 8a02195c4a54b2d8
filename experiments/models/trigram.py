"""The baseline of a language model: counts of three bytes in a row."""

import numpy as np

_ORDERS = 3


def bits_per_character(train: str, test: str) -> float:
    """Returns how many bits a trigram model of one text needs for another.

    Of UTF-8 bytes, with Witten-Bell smoothing, which has no parameters:

        p(c | h) = (n(h c) + t(h) p(c | h')) / (n(h) + t(h))

    where n counts in `train`, t(h) is how many different bytes follow h there, h' is h
    without its first byte, and below the empty h all 256 bytes are alike.

    Source: Witten and Bell 1991, doi:10.1109/18.87000; Chen and Goodman 1996,
    doi:10.3115/981863.981904
    """
    seen, asked = (np.frombuffer(b"\n\n" + text.encode(), np.uint8).astype(np.int64)
                   for text in (train, test))
    chance = np.full(len(asked) - 2, 1 / 256)
    for order in range(_ORDERS):
        context, wanted = _contexts(asked, order), asked[2:]
        counts = np.bincount(
            _contexts(seen, order) * 256 + seen[2:], minlength=256 ** (order + 1))
        followers = counts.reshape(-1, 256)
        different = np.count_nonzero(followers, 1)[context]
        total = followers.sum(1)[context] + different
        better = counts[context * 256 + wanted] + different * chance
        chance = np.where(total > 0, better / np.maximum(total, 1), chance)
    return float(-np.log2(chance).sum() / len(test))


def _contexts(text: np.ndarray, order: int) -> np.ndarray:
    """Returns the last `order` bytes before each, from the third on, as a number."""
    code = np.zeros(len(text) - 2, np.int64)
    for back in range(order, 0, -1):
        code = code * 256 + text[2 - back:len(text) - back]
    return code
