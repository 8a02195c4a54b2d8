"""What docs/csv.md gives to paste learns from a table and predicts another one."""

import csv

import numpy as np
import pages
import pytest

import mpl
from mpl.data import DataContext

PAGE = "csv.md"


@pytest.fixture(scope="module")
def page():
    return pages.names_of(PAGE, 0)


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def flowers(count):
    """Blue flowers are asters if they are wide, others if they are long."""
    random = np.random.default_rng(0)
    for _ in range(count):
        colour = str(random.choice(["blue", "red", "white"]))
        length, width = random.normal([1000, 0.001], [100, 0.0001])
        is_aster = width > 0.001 if colour == "blue" else length > 1000
        yield {"length": f"{length:.1f}", "width": f"{width:.7f}", "colour": colour,
               "kind": "aster" if is_aster else "iris"}


def build_data(page, folder, split="train"):
    context = DataContext(str(folder), 64, 0, None)
    experiment = page["Flowers"]()
    return experiment, experiment.build_data(split, context)


@pytest.mark.slow
def test_the_commands(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data" / "flowers.csv", list(flowers(2000)))
    train, predict = pages.commands(PAGE)
    results = pages.typed(train, page["Flowers"], "--policy=mixed_bfloat16")
    assert results["test"]["accuracy"] > 0.9
    new = [{"length": "1300", "width": "0.0007", "colour": colour, "name": "x"}
           for colour in ("blue", "red", "green")]
    write(tmp_path / "new.csv", new)
    pages.typed(predict, page["Flowers"])
    capsys.readouterr()
    exec(pages.blocks(PAGE, "python")[1], page)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["1300,0.0007,blue,x,iris", "1300,0.0007,red,x,aster"]
    assert lines[2].startswith("1300,0.0007,green,x,")


def test_the_rows_of_the_page_are_read(page, tmp_path):
    (tmp_path / "flowers.csv").write_text(pages.blocks(PAGE)[0])
    rows = page["read_rows"](tmp_path / "flowers.csv")
    arrays = page["features"](rows)
    np.testing.assert_allclose(arrays["numbers"], [[5.1, 0.2], [6.3, 1.8]], rtol=1e-6)
    assert arrays["colour"].tolist() == [1, 2]


def test_rows_are_split_by_their_text_and_statistics_are_of_training(page, tmp_path):
    rows = list(flowers(500))
    write(tmp_path / "flowers.csv", rows + rows)
    experiment, train = build_data(page, tmp_path)
    lengths = []
    for split in ("train", "validation", "test"):
        own = [row for row in rows if page["part_of"](row) == split]
        lengths.append(len(own))
        assert len(build_data(page, tmp_path, split)[1]["label"]) == 2 * len(own)
    assert sum(lengths) == 500 and 350 < lengths[0] < 450
    own = [float(row["length"]) for row in rows if page["part_of"](row) == "train"]
    np.testing.assert_allclose(experiment.mean[0], np.mean(own), rtol=1e-5)
    np.testing.assert_allclose(experiment.variance[0], np.var(own), rtol=1e-4)


def test_cells_that_are_empty_or_unknown(page, tmp_path):
    rows = [row for row in flowers(50) if page["part_of"](row) == "train"]
    rows[3]["width"] = ""
    arrays = page["features"](rows)
    with pytest.raises(mpl.ConfigError, match="`numbers` has a NaN .* in record 3"):
        mpl.ArraySource(arrays)
    rows = [{"length": "1", "width": "1", "colour": "red", "kind": "tulip"}] * 20
    rows = [{**row, "length": str(number)} for number, row in enumerate(rows)]
    write(tmp_path / "flowers.csv", rows)
    with pytest.raises(ValueError, match="'tulip' is not in list"):
        build_data(page, tmp_path)
