"""Ratings of films: MovieLens in its three layouts, and synthetic ones.

MovieLens may be downloaded from https://grouplens.org/datasets/movielens/ and not
redistributed, so that none of it is part of this repository.
"""

import io
import os

import numpy as np
import tensorflow as tf

import mpl

HEADER = "userId,movieId,rating,timestamp"
SEPARATORS = {"u.data": "\t", "ratings.dat": "::", "ratings.csv": ","}  # 100K, 1M, 20M
MAX_ID = 10_000_000
SCALE = 0.5, 5.0
_COLUMNS = [("user", "i8"), ("item", "i8"), ("rating", "f4"), ("time", "i8")]
_SPLIT_SEED = 0

# What the synthetic ratings are made of.
RANK, MEAN, NOISE = 4, 3.5, 0.4
_BIAS, _FACTOR = 0.3, 0.5  # standard deviations

Ratings = dict[str, np.ndarray]


def find(folder: str) -> str:
    """Returns the path of the ratings in a folder, whichever layout they have.

    Raises:
        ConfigError: the folder holds none, or those of several sets.
    """
    paths = [os.path.join(folder, name) for name in SEPARATORS]
    found = [path for path in paths if tf.io.gfile.exists(path)]
    if len(found) != 1:
        raise mpl.ConfigError(
            f"`data_dir` ({folder}) must hold one of {', '.join(SEPARATORS)}, and "
            f"holds {len(found)} of them.",
            "Unpack one set of https://grouplens.org/datasets/movielens/, as ml-1m.zip,"
            " and name the folder with its ratings.")
    return found[0]


def read(path: str) -> Ratings:
    """Reads a file of ratings.

    Args:
        path: its name says which layout it has: `u.data` is that of 100K, `ratings.dat`
            of 1M, `ratings.csv` of 20M and later sets.

    Returns:
        `user` and `item`: int32 `[num_ratings]`, the file's own ids, from 1 on with
        gaps; `rating`: float32 `[num_ratings]`, 0.5 to 5.

    Raises:
        ConfigError: the file is cut off, has another header, or a line of it breaks a
            rule; the error names the line.
    """
    separator, has_header = SEPARATORS[os.path.basename(path)], path.endswith(".csv")
    with tf.io.gfile.GFile(path, "rb") as file:
        content = file.read()
    if not content.endswith(b"\n"):
        line = content.count(b"\n") + 1
        raise mpl.ConfigError(
            f"{path} is cut off: its last line, {line}, has no end.",
            "Unpack it anew; if it is whole, end it with a new line.")
    lines = io.BytesIO(content)
    if has_header:
        header = lines.readline().decode("latin-1").rstrip("\r\n")
        if header != HEADER:
            raise mpl.ConfigError(
                f"{path} begins with {header[:80]!r}, and must with {HEADER!r}.",
                "Give the file of a MovieLens set of 20M ratings or later.")
    body = content[lines.tell():]
    try:
        if not body.strip():
            raise ValueError("it holds no ratings")
        table = np.loadtxt(
            io.BytesIO(body.replace(separator.encode(), b"\t")), _COLUMNS,
            comments=None, delimiter="\t", encoding="latin-1", ndmin=1)
        ids = table["user"], table["item"]
        good = all(1 <= each.min() and each.max() <= MAX_ID for each in ids) and (
            SCALE[0] <= table["rating"].min() and table["rating"].max() <= SCALE[1])
        reason = "it breaks a rule"
    except ValueError as error:  # no numbers, other columns, no lines
        good, reason = False, str(error)
    if not good:
        raise _fault(path, body.decode("latin-1"), separator, has_header, reason)
    return {"user": table["user"].astype(np.int32),
            "item": table["item"].astype(np.int32), "rating": table["rating"]}


def _fault(
    path: str, body: str, separator: str, has_header: bool, reason: str
) -> mpl.ConfigError:
    """Returns the error of the first line that breaks a rule."""
    for number, line in enumerate(body.splitlines(), 1 + has_header):
        if rule := _broken_rule(line.split(separator)):
            reason = f"line {number} {rule}: {line[:80]!r}"
            break
    return mpl.ConfigError(
        f"{path} cannot be read: {reason}.",
        f"Give user{separator}item{separator}rating{separator}timestamp in each line, "
        "as MovieLens does.".replace("\t", "<tab>"))


def _broken_rule(fields: list[str]) -> str | None:
    if len(fields) != 4:
        return f"has {len(fields)} fields, not 4"
    try:
        user, item, _ = (int(fields[place]) for place in (0, 1, 3))
        rating = float(fields[2])
    except ValueError:
        return "holds what is no number"
    if not 1 <= min(user, item) <= max(user, item) <= MAX_ID:
        return f"has an id outside of 1 ... {MAX_ID}"
    if not SCALE[0] <= rating <= SCALE[1]:
        return f"has a rating outside of {SCALE[0]} ... {SCALE[1]}"
    return None


def split(ratings: Ratings) -> dict[str, Ratings]:
    """Returns 80 % of the ratings, drawn at random, as "train", and 10 % each as
    "validation" and "test"; of too few ratings without the one or the other.
    """
    count = len(ratings["rating"])
    # RandomState, because NumPy promises that its numbers never change.
    order = np.random.RandomState(_SPLIT_SEED).permutation(count)
    ends = [-(-share * count // 10) for share in (8, 9, 10)]  # at least one trains
    parts = zip(("train", "validation", "test"), np.split(order, ends))
    return {name: {key: array[part] for key, array in ratings.items()}
            for name, part in parts if len(part)}


def synthetic(
    num_users: int, num_items: int, num_ratings: int
) -> tuple[Ratings, np.ndarray]:
    """Makes ratings from factors that are known.

        rating = MEAN + b_user + b_item + p_user · q_item + noise

    where p and q have RANK elements and the noise, which nothing can predict, the
    standard deviation NOISE. They are the same at each call.

    Args:
        num_users: users, numbered from 1; as many draw from all items alike.
        num_items: items, numbered from 1.
        num_ratings: ratings, each of a pair drawn at random.

    Returns:
        Ratings as of `read`, though of any value, and what they are without the noise:
        float32 `[num_ratings]`.
    """
    random = np.random.RandomState(1)
    normal = random.standard_normal

    def planted(count: int) -> tuple[np.ndarray, np.ndarray]:
        vectors, biases = _FACTOR * normal((count + 1, RANK)), _BIAS * normal(count + 1)
        return vectors.astype(np.float32), biases.astype(np.float32)

    (p, of_users), (q, of_items) = planted(num_users), planted(num_items)
    user = random.randint(1, num_users + 1, num_ratings).astype(np.int32)
    item = random.randint(1, num_items + 1, num_ratings).astype(np.int32)
    clean = MEAN + of_users[user] + of_items[item] + (p[user] * q[item]).sum(-1)
    noise = NOISE * normal(num_ratings)
    rating = (clean + noise).astype(np.float32)
    return {"user": user, "item": item, "rating": rating}, clean.astype(np.float32)


def read_pairs(
    path: str, limits: tuple[int, int] = (MAX_ID, MAX_ID)
) -> dict[str, np.ndarray]:
    """Reads pairs to predict, from a file that begins as `ratings.csv` does.

    Args:
        path: a file whose header begins with `userId,movieId`; more columns do not
            count.
        limits: the highest user's and item's id.

    Returns:
        `user` and `item`: int32 `[num_pairs]`.

    Raises:
        ConfigError: another header, or a line without two ids within the limits.
    """
    with tf.io.gfile.GFile(path, "rb") as file:
        header, *lines = file.read().decode("latin-1").splitlines() or [""]
    remedy = "Write userId,movieId in the first line, and two ids in each other one."
    if header.split(",")[:2] != ["userId", "movieId"]:
        raise mpl.ConfigError(
            f"{path} begins with {header[:80]!r}, not with userId,movieId.", remedy)
    pairs = []
    for number, line in enumerate(lines, 2):
        fields = line.split(",")
        pair = [int(text) if text.isdecimal() else 0 for text in fields[:2]]
        if len(pair) < 2 or not all(1 <= n <= most for n, most in zip(pair, limits)):
            raise mpl.ConfigError(
                f"{path} has no user from 1 to {limits[0]} and item from 1 to "
                f"{limits[1]} in line {number}: {line[:80]!r}.", remedy)
        pairs.append(pair)
    users, items = np.array(pairs, np.int32).reshape([-1, 2]).T
    return {"user": users, "item": items}
