"""Synthetic images and volumes of lesions, whose risk is known.

    log odds = INTERCEPT + RADIUS_EFFECT · r + CONTRAST_EFFECT · c

where r and c are a lesion's radius and contrast with mean 0 and standard deviation 1.
Where it lies, how bright the rest is and what noise lies over it mean nothing.
"""

import numpy as np

INTERCEPT, RADIUS_EFFECT, CONTRAST_EFFECT = -1.0, 1.5, 1.5
SIZE = 28
_RADIUS, _CONTRAST = (2.0, 5.0), (0.25, 0.7)  # in pixels; of the range of grey
_CENTRE, _GROUND, _NOISE = (8.0, 20.0), (0.05, 0.2), 0.05
_SEEDS = {"train": 1, "validation": 2, "test": 3}
NUM_EXAMPLES = {2: {"train": 16_000, "validation": 1000, "test": 1000},
                3: {"train": 600, "validation": 100, "test": 200}}


def load(split: str, rank: int = 2) -> dict[str, np.ndarray]:
    """Makes one split, the same at each call.

    Args:
        split: "train", "validation" or "test".
        rank: 2 for images, 3 for volumes.

    Returns:
        `image`: uint8 `[num_examples, 28, 28, 1]`, or with one 28 more; `label`: int32
        `[num_examples, 1]`, 1 for the ill.
    """
    radius, contrast, label, random = _draw(split, rank)
    count = len(label)
    centre = random.uniform(*_CENTRE, (rank, count))
    ground = random.uniform(*_GROUND, count)

    def along(values: np.ndarray, axis: int = 0) -> np.ndarray:
        """Returns values `[count]` or `[count, SIZE]` as one direction of images."""
        shape = [count, *[1] * rank]
        shape[1 + axis] = -1
        return values.reshape(shape).astype(np.float32)

    # What a lesion adds is a product of as many curves as there are directions.
    image = along(contrast)
    for axis, each in enumerate(centre):
        distance = (np.arange(SIZE) - each[:, np.newaxis]) / radius[:, np.newaxis]
        image = image * along(np.exp(-distance**2 / 2), axis)
    image += along(ground)
    image += _NOISE * random.standard_normal(image.shape).astype(np.float32)
    image = (255 * np.clip(image, 0, 1)).round().astype(np.uint8)
    return {"image": image[..., np.newaxis], "label": label[:, np.newaxis]}


def factors(split: str, rank: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Returns what `load` made the images of: r and c, float64 `[num_examples]`."""
    radius, contrast, *_ = _draw(split, rank)
    return _standard(radius, _RADIUS), _standard(contrast, _CONTRAST)


def log_odds(r: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Returns the log odds of illness, of r and c."""
    return INTERCEPT + RADIUS_EFFECT * r + CONTRAST_EFFECT * c


def _draw(split: str, rank: int) -> tuple:
    # RandomState, because NumPy promises that its numbers never change.
    random = np.random.RandomState(10 * rank + _SEEDS[split])
    count = NUM_EXAMPLES[rank][split]
    radius = random.uniform(*_RADIUS, count)
    contrast = random.uniform(*_CONTRAST, count)
    odds = log_odds(_standard(radius, _RADIUS), _standard(contrast, _CONTRAST))
    label = (random.uniform(size=count) < 1 / (1 + np.exp(-odds))).astype(np.int32)
    return radius, contrast, label, random


def _standard(values: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """Returns numbers drawn evenly within limits with mean 0 and deviation 1."""
    low, high = limits
    return (values - (low + high) / 2) / ((high - low) / 12**0.5)
