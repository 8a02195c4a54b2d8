"""MovieLens in its three layouts, damaged files, and synthetic ratings."""

import numpy as np
import pytest

import mpl
from experiments.datasets import movielens

LINES = [(1, 1193, 5, 978300760), (1, 661, 3, 978302109), (6040, 1193, 4, 956704746)]
CSV = "userId,movieId,rating,timestamp\n"
FILES = {
    "u.data": "".join("\t".join(map(str, line)) + "\n" for line in LINES),
    "ratings.dat": "".join("::".join(map(str, line)) + "\n" for line in LINES),
    "ratings.csv": CSV + "".join(",".join(map(str, line)) + "\n" for line in LINES),
}


def written(folder, name, text):
    path = folder / name
    path.write_bytes(text.encode("latin-1"))
    return str(path)


@pytest.mark.parametrize("name", FILES)
def test_each_layout_is_read(name, tmp_path):
    path = written(tmp_path, name, FILES[name])
    assert movielens.find(str(tmp_path)) == path
    ratings = movielens.read(path)
    assert ratings["user"].tolist() == [1, 1, 6040]
    assert ratings["item"].tolist() == [1193, 661, 1193]
    assert ratings["rating"].tolist() == [5.0, 3.0, 4.0]
    assert [array.dtype for array in ratings.values()] == ["int32", "int32", "float32"]


def test_half_stars_and_windows_lines_are_read(tmp_path):
    text = (CSV + "7,131262,0.5,1425944200\n").replace("\n", "\r\n")
    ratings = movielens.read(written(tmp_path, "ratings.csv", text))
    assert {key: array.tolist() for key, array in ratings.items()} == {
        "user": [7], "item": [131262], "rating": [0.5]}


GOOD = "1\t2\t3\t4\n"


@pytest.mark.parametrize("name, text, cause", [
    ("u.data", GOOD + "1\t2\t3\t97830", "is cut off: its last line, 2, has no end"),
    ("u.data", "", "is cut off: its last line, 1, has no end"),
    ("ratings.csv", CSV, "cannot be read: it holds no ratings"),
    ("ratings.csv", "user,item,rating,time\n1,2,3,4\n",
     "begins with 'user,item,rating,time', and must with 'userId,movieId,rating"),
    ("u.data", GOOD + "1\t2\t3\n", r"line 2 has 3 fields, not 4: '1\\t2\\t3'"),
    ("u.data", GOOD + "1\t2\t3\t4\t5\n", "line 2 has 5 fields, not 4"),
    ("u.data", "1::2::3::4\n", "line 1 has 1 fields, not 4"),
    ("u.data", GOOD + "1\ttwo\t3\t4\n", "line 2 holds what is no number"),
    ("u.data", GOOD + "1\t2.5\t3\t4\n", "line 2 holds what is no number"),
    ("u.data", GOOD + "0\t2\t3\t4\n", "line 2 has an id outside of 1 ... 10000000"),
    ("u.data", GOOD + "1\t99999999999999999999\t3\t4\n", "line 2 has an id outside of"),
    ("u.data", GOOD + "1\t2\t5.5\t4\n", "line 2 has a rating outside of 0.5 ... 5.0"),
    ("u.data", GOOD + "1\t2\t0\t4\n", "line 2 has a rating outside of 0.5 ... 5.0"),
    ("u.data", GOOD + "1\t2\tnan\t4\n", "line 2 has a rating outside of 0.5 ... 5.0"),
    ("ratings.csv", CSV + "1,2,3,4\n1,2,9,4\n", "line 3 has a rating outside of"),
    ("ratings.dat", "1::2::3::4\n1::2::9::4\n", "line 2 has a rating outside of"),
])
def test_a_bad_file_is_named_with_its_line(name, text, cause, tmp_path):
    path = written(tmp_path, name, text)
    with pytest.raises(mpl.ConfigError, match=cause) as caught:
        movielens.read(path)
    assert caught.value.cause.startswith(path) and caught.value.remedy


def test_a_folder_must_hold_one_set(tmp_path):
    with pytest.raises(mpl.ConfigError, match="ratings.csv, and holds 0 of them"):
        movielens.find(str(tmp_path))
    for name in ("u.data", "ratings.dat"):
        written(tmp_path, name, FILES[name])
    with pytest.raises(mpl.ConfigError, match="holds 2 of them"):
        movielens.find(str(tmp_path))


def test_the_splits_are_fixed_and_share_no_rating():
    number = np.arange(1000)
    parts = movielens.split({"rating": number})
    assert list(parts) == ["train", "validation", "test"]
    parts = [part["rating"] for part in parts.values()]
    assert [len(part) for part in parts] == [800, 100, 100]
    assert sorted(np.concatenate(parts)) == number.tolist()
    # Numbers that no other NumPy may change.
    assert parts[0][:3].tolist() == [993, 859, 298]


@pytest.mark.parametrize("count, sizes", [
    (1, {"train": 1}), (4, {"train": 4}), (6, {"train": 5, "validation": 1}),
    (10, {"train": 8, "validation": 1, "test": 1})])
def test_few_ratings_train_first(count, sizes):
    parts = movielens.split({"rating": np.arange(count)})
    assert {name: len(part["rating"]) for name, part in parts.items()} == sizes


def test_synthetic_ratings_are_what_they_are_said_to_be():
    ratings, clean = movielens.synthetic(30, 20, 20_000)
    again, _ = movielens.synthetic(30, 20, 20_000)
    for key, array in ratings.items():
        np.testing.assert_array_equal(array, again[key])
    assert set(ratings["user"]) == set(range(1, 31))
    assert set(ratings["item"]) == set(range(1, 21))
    noise = ratings["rating"] - clean
    assert abs(noise.std() - movielens.NOISE) < 0.01 and abs(noise.mean()) < 0.01
    # But for the biases, the ratings without noise are a matrix of the planted rank.
    matrix = np.full((30, 20), np.nan)
    matrix[ratings["user"] - 1, ratings["item"] - 1] = clean
    strength = np.linalg.svd(matrix - movielens.MEAN, compute_uv=False)
    assert strength[movielens.RANK + 1] > 0.1 > 1e-4 > strength[movielens.RANK + 2]


def test_pairs_to_predict_are_read(tmp_path):
    path = written(tmp_path, "pairs.csv", "userId,movieId\n3,10\n1,2\n")
    pairs = movielens.read_pairs(path, (3, 10))
    assert pairs["user"].tolist() == [3, 1] and pairs["item"].tolist() == [10, 2]
    whole = movielens.read_pairs(written(tmp_path, "ratings.csv", FILES["ratings.csv"]))
    assert whole["item"].tolist() == [1193, 661, 1193]
    assert whole["user"].dtype == np.int32


@pytest.mark.parametrize("text, cause", [
    ("3,10\n", "begins with '3,10', not with userId,movieId"),
    ("", "begins with ''"),
    ("userId,movieId\n3,11\n", "item from 1 to 10 in line 2: '3,11'"),
    ("userId,movieId\n3,10\n4,1\n", "user from 1 to 3 and .* in line 3: '4,1'"),
    ("userId,movieId\n3\n", "in line 2: '3'"),
    ("userId,movieId\n0,1\n", "in line 2: '0,1'"),
    ("userId,movieId\nx,1\n", "in line 2: 'x,1'"),
])
def test_bad_pairs_are_named_with_their_line(text, cause, tmp_path):
    path = written(tmp_path, "pairs.csv", text)
    with pytest.raises(mpl.ConfigError, match=cause) as caught:
        movielens.read_pairs(path, (3, 10))
    assert caught.value.cause.startswith(path)
