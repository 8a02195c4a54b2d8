"""Predicts ratings: matrix factorisation with biases, and an MLP where wanted.

    python -m experiments.movielens
    python -m experiments.movielens --data_dir=ml-1m --factors=32 --penalty=0.05
    python -m experiments.movielens --data_dir=ml-1m --mlp=64,32
    python -m experiments.movielens --users=1000000 --factors=32 --train_steps=500
    python -m experiments.movielens --mode=predict --input=pairs.csv

--data_dir holds `u.data` (100K), `ratings.dat` (1M) or `ratings.csv` (20M and later);
80 % of the ratings, drawn at random, train. Without it the data are synthetic: factors
of rank 4 and noise, which are known, and their figures are named so.
Expected, on the test data, whose noise is 0.404: synthetic_rmse 0.4155 in any policy,
0.420 with --mlp=64,32; without it 3 seconds of training on 2 CPU cores. The fourth
trains a table of 10⁶ rows, of which a step updates those it has read.
Hardware: any. On MovieLens: not run here.
Source: Koren, Bell and Volinsky 2009, https://doi.org/10.1109/MC.2009.263; He et al.
2017, https://arxiv.org/abs/1708.05031 (--mlp, here for ratings).
"""

import dataclasses

import keras
import tensorflow as tf

import mpl
from experiments.datasets import movielens
from experiments.models.factorization import factorization

SIZES = {"users": 1000, "items": 500, "ratings": 250_000}


@dataclasses.dataclass(frozen=True)
class Config(mpl.RunConfig):
    """Flags of this experiment, and its own defaults."""

    train_epochs = 10
    global_batch_size = 1024
    learning_rate = 1e-2
    lr_schedule = "cosine"
    factors: int = mpl.option(8, "Length of a user's and an item's vector.", minimum=1)
    penalty: float = mpl.option(
        0.03, "Factor of the squared length of the rows that a rating reads.",
        minimum=0)
    mlp: str | None = mpl.option(
        None, "Units of the layers of an MLP beside the factors: 64,32. none: no MLP.")
    users: int | None = mpl.option(
        None, "Users of the synthetic data. none: 1000.", minimum=1)
    items: int | None = mpl.option(
        None, "Items of the synthetic data. none: 500.", minimum=1)
    ratings: int | None = mpl.option(
        None, "Ratings in the synthetic data. none: 250,000.", minimum=10)

    def validate(self):
        super().validate()
        units_of(self.mlp)
        given = [name for name in SIZES if getattr(self, name) is not None]
        if given and self.data_dir is not None:
            raise mpl.ConfigError(
                f"`{given[0]}` is of synthetic data, and `data_dir` ({self.data_dir}) "
                "of real ones.", "Leave one of the two out.")


def units_of(text: str | None) -> list[int]:
    """Returns the numbers in a text such as 64,32; of None none.

    Raises:
        ConfigError: other text.
    """
    units = text.split(",") if text is not None else []
    if not all(unit.isdecimal() and int(unit) for unit in units):
        raise mpl.ConfigError(
            f"`mlp` ({text}) must be the units of layers, as 64,32.",
            "Write --mlp=64,32, or leave it out.")
    return [int(unit) for unit in units]


class Movielens(mpl.Experiment):
    """Ratings of items by users."""

    Config = Config
    prefix = ""  # of the metrics' names, in every line of the log and every report
    max_ids = movielens.MAX_ID, movielens.MAX_ID

    def build_data(self, split, context):
        if split == "train":  # the first
            ratings, source = self.read(context.data_dir)
            # An id is a row: gaps between ids cost memory alone.
            self.max_ids = int(ratings["user"].max()), int(ratings["item"].max())
            print(f"Data: {len(ratings['user']):,} {source}, user ids to "
                  f"{self.max_ids[0]:,}, item ids to {self.max_ids[1]:,}", flush=True)
            self.parts = movielens.split(ratings)
            self.mean = float(self.parts["train"]["rating"].mean(dtype="float64"))
        return self.parts.get(split)

    def read(self, folder):
        if folder is not None:
            path = movielens.find(folder)
            return movielens.read(path), f"ratings of {path}"
        self.prefix = "synthetic_"
        sizes = [getattr(self.config, name) or size for name, size in SIZES.items()]
        ratings, _ = movielens.synthetic(*sizes)
        noise = f"of rank {movielens.RANK}, noise {movielens.NOISE}"
        return ratings, f"synthetic ratings (no --data_dir) {noise}"

    def build_model(self):
        users, items = self.max_ids
        return factorization(
            users + 1, items + 1, self.config.factors, self.mean,
            units_of(self.config.mlp))

    def loss(self, batch, training):
        score, length = self.model([batch["user"], batch["item"]], training=training)
        losses = tf.square(batch["rating"] - score) + self.config.penalty * length
        return mpl.LossOutput(losses, batch["weight"], (batch["rating"], score))

    def metrics(self):
        return {f"{self.prefix}rmse": keras.metrics.RootMeanSquaredError()}

    def predict(self, batch):
        score, _ = self.model([batch["user"], batch["item"]], training=False)
        return {"rating": score}

    def read_input(self, path):  # pairs in the layout of ratings.csv
        is_csv = path.endswith(".csv")
        return [movielens.read_pairs(path, self.max_ids)] if is_csv else None


if __name__ == "__main__":
    mpl.run(Movielens)
