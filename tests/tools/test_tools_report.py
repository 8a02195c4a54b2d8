import html.parser
import json
import math
import os
import sys

import matplotlib.image
import pytest

from mpl.tools import plots, report

TEXT = "<script>alert('$x')</script>&\"$"


def write_run(path, policy="float32", goodput=None, **more):
    path.mkdir(parents=True)
    lines = []
    for number, (scale, skips) in enumerate(((8, 0), (4, 2), (4, 2), (2, 3)), 1):
        values = {"loss": 10.0 ** -number, "accuracy": number / 5, **more}
        train = {"step": 10 * number, "split": "train", **values,
                 "learning_rate": 0.1, "loss_scale": scale, "skipped_steps": skips,
                 "steps_per_sec": 5.0, "examples_per_sec": 40.0}
        if goodput:
            train["goodput"] = goodput
        lines += [train, {"step": 10 * number, "split": "validation", **values}]
    lines.append({"step": 40, "split": "test", "loss": None, "accuracy": 0.875})
    (path / "metrics.jsonl").write_text("".join(json.dumps(n) + "\n" for n in lines))
    (path / "flagfile.txt").write_text(
        f"--policy={policy}\n--optimizer={TEXT}\n--seed=0\n")
    return str(path)


class Page(html.parser.HTMLParser):
    """What a page holds: tags, attributes, the cells of its tables."""

    VOID = {"meta", "img", "br"}

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.attributes, self.rows = [], [], [], []
        with open(path, encoding="utf-8") as file:
            self.feed(file.read())
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, in order."""
    drawn, png = [], plots.png
    monkeypatch.setattr(plots, "png", lambda each: drawn.append(each) or png(each))
    return drawn


def test_the_page_of_one_run(tmp_path):
    path = write_run(tmp_path / "run")
    page = Page(report.report([path]))
    assert page.open == []
    assert sorted(os.listdir(tmp_path / "run" / "report")) == [
        "metrics.png", "report.html", "training.png"]
    assert page.rows == [
        ["", path], ["validation accuracy, last", "0.8"],
        ["validation loss, last", "0.0001"], ["test accuracy, last", "0.875"],
        ["test loss, last", "–"], ["steps", "40"], ["time in training [s]", "8"],
        ["examples/s, median", "40"], ["skipped steps", "3"]]


def test_several_runs_beside_each_other_what_differs_first(tmp_path):
    paths = [write_run(tmp_path / "a"), write_run(tmp_path / "b", "mixed_float16", 0.5)]
    out = tmp_path / "out"
    page = Page(report.report([*paths, paths[0]], str(out)))
    assert page.rows[:4] == [
        ["", *paths], ["Flags that differ"], ["--policy", "float32", "mixed_float16"],
        ["Figures"]]
    assert page.rows[-1] == ["goodput", "–", "0.5"]
    assert "--seed" not in [row[0] for row in page.rows]
    assert "--seed=0" in (out / "report.html").read_text()


def test_the_page_stands_alone_and_escapes_what_runs_say(tmp_path):
    path = write_run(tmp_path / TEXT.replace("/", "|"), **{TEXT: 1.0})
    file = report.report([path], str(tmp_path / "out"))
    page = Page(file)
    assert page.open == [] and not {"script", "link", "iframe"} & {*page.tags}
    assert [row[0] for row in page.rows].count(f"validation {TEXT}, last") == 1
    sources = [value for name, value in page.attributes if name in ("src", "href")]
    assert len(sources) == 2
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    with open(file, encoding="utf-8") as text:
        assert "http:" not in (content := text.read()) and "https:" not in content


def test_the_pictures(tmp_path, figures):
    write_run(tmp_path / "a", goodput=0.75)
    write_run(tmp_path / "b", "mixed_float16")
    out = tmp_path / "out"
    report.report([str(tmp_path / "a"), str(tmp_path / "b")], str(out))
    metrics, training = figures
    assert [axes.get_title() for axes in metrics.axes] == ["loss", "accuracy"]
    assert [axes.get_yscale() for axes in metrics.axes] == ["log", "linear"]
    assert all(axes.get_xlabel() == "step" for axes in (*metrics.axes, *training.axes))
    train, validation, test = metrics.axes[1].lines[:3]
    assert list(train.get_ydata()) == [0.2, 0.4, 0.6, 0.8]
    assert list(validation.get_ydata()) == [0.2, 0.4, 0.6, 0.8]
    assert (list(test.get_xdata()), list(test.get_ydata())) == ([40], [0.875])
    assert [axes.get_ylabel() for axes in training.axes] == [
        "learning rate", "loss scale", "throughput [examples/s]",
        "goodput [share of wall time]"]
    scale = training.axes[1]
    assert scale.get_yscale() == "log"
    curve, skips = scale.lines[:2]
    assert list(curve.get_ydata()) == [8, 4, 4, 2]
    assert (list(skips.get_xdata()), list(skips.get_ydata())) == ([20, 40], [4, 2])
    words = [text.get_text() for text in training.legends[0].get_texts()]
    assert words[2:] == ["steps skipped since the line before"] and len(words) == 3
    for name in ("metrics.png", "training.png"):
        height, width, _ = matplotlib.image.imread(out / name).shape
        assert width == 1440 and height > 400


def test_without_goodput_and_skips_they_are_not_drawn(tmp_path, figures):
    (tmp_path / "run").mkdir()
    lines = [{"step": n, "split": "train", "loss": math.pi, "skipped_steps": 0,
              "loss_scale": 1.0, "steps_per_sec": 1.0} for n in (1, 2)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "run" / "metrics.jsonl").write_text(text)
    page = Page(report.report([str(tmp_path / "run")]))
    metrics, training = figures
    assert [axes.get_title() for axes in training.axes] == ["loss scale"]
    assert len(training.legends[0].get_texts()) == 1
    assert ["train loss, last", "3.142"] in page.rows
    assert "goodput" not in [row[0] for row in page.rows]


def test_many_metrics_take_several_pictures(tmp_path):
    path = write_run(tmp_path / "run", **{f"m{n}": 1.0 for n in range(4)})
    report.report([path])
    names = sorted(name for name in os.listdir(tmp_path / "run" / "report"))
    assert names == ["metrics.png", "metrics1.png", "report.html", "training.png"]


def test_the_command_takes_the_latest_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert report.main([]) == 1
    assert capsys.readouterr().err == (
        "No run is named, and `runs` holds none.\n"
        "Name the folder of a run, or train one: make train.\n")
    for age, name in enumerate(("runs/a/1", "runs/b", "runs/a/2")):
        write_run(tmp_path / name)
        os.utime(tmp_path / name / "metrics.jsonl", (9 - age, 9 - age))
    os.symlink("1", "runs/a/latest")
    assert report.main([]) == 0
    assert capsys.readouterr().out == "Look at runs/a/1/report/report.html\n"


def test_errors_are_two_lines_and_a_code(tmp_path, monkeypatch, capsys):
    assert report.main([str(tmp_path / "none")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 2
    with pytest.raises(SystemExit, match="2"):
        report.main(["--nothing"])
    assert "See python -m mpl.tools.report --help." in capsys.readouterr().err
    paths = [write_run(tmp_path / "a"), write_run(tmp_path / "b")]
    (tmp_path / "b" / "metrics.jsonl").write_text(
        '{"step": 1, "split": "test", "bleu": 1}\n')
    assert report.main(paths) == 1
    assert "no metric in common" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.main(paths[:1]) == 1
    assert capsys.readouterr().err.endswith("pip install 'mpl[plots]'.\n")
