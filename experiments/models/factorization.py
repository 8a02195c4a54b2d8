"""Matrix factorisation with biases, and beside it an MLP on tables of its own."""

from collections.abc import Sequence

import keras

layers, ops = keras.layers, keras.ops


def factorization(
    num_users: int, num_items: int, factors: int, mean: float, units: Sequence[int] = ()
) -> keras.Model:
    """Makes a model that scores pairs of a user and an item.

        score = mean + b_user + b_item + p_user · q_item [+ MLP(p'_user, q'_item)]

    The vectors have the policy's precision; all that is added up is float32. Tables of
    256 KiB and more are read and updated row by row.

    Args:
        num_users: rows of the users' tables; a user's number is a row.
        num_items: rows of the items' tables.
        factors: length of each vector p, q, p' and q'.
        mean: of the ratings.
        units: of the MLP's hidden layers; empty: no MLP.

    Returns:
        A model of users and items, int32 `[batch]` each. It returns the scores, and the
        squared length of all rows that each of them read, both float32 `[batch]`.

    Source: Koren, Bell and Volinsky 2009, Matrix Factorization Techniques for
        Recommender Systems, https://doi.org/10.1109/MC.2009.263; He et al. 2017, Neural
        Collaborative Filtering, https://arxiv.org/abs/1708.05031
    """
    user = keras.Input((), dtype="int32", name="user")
    item = keras.Input((), dtype="int32", name="item")

    def rows(name: str, width: int, stddev: float, **settings) -> list:
        return [
            layers.Embedding(
                count, width, keras.initializers.RandomNormal(stddev=stddev),
                name=f"{whose}_{name}", **settings)(ids)
            for whose, count, ids in (
                ("user", num_users, user), ("item", num_items, item))
        ]

    vectors = rows("factors", factors, 0.1)
    biases = rows("bias", 1, 0.0, dtype="float32")
    parts = [layers.Dot(1, dtype="float32")(vectors), *biases]
    read = [*vectors, *biases]
    if units:
        inputs = rows("mlp", factors, 0.1)
        read += inputs
        x = layers.Concatenate()(inputs)
        for number in units:
            x = layers.Dense(number, activation="relu")(x)
        parts.append(layers.Dense(1, use_bias=False, dtype="float32")(x))
    score = layers.Add(dtype="float32")(parts)[:, 0] + mean
    lengths = ops.square(layers.Concatenate(dtype="float32")(read))
    return keras.Model([user, item], [score, ops.sum(lengths, axis=-1)])
