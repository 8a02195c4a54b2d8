"""docs/graphs_and_loops.md prints what it says, and its commands learn the line."""

import pathlib
import re
import runpy

import mpl
from experiments.linear import Linear

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "graphs_and_loops.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$", PAGE, re.S | re.M)


def test_each_block_prints_what_stands_below_it(tmp_path, capsys):
    assert len(BLOCKS) == PAGE.count("```python") == PAGE.count("```text") == 8
    file, end = tmp_path / "page.py", "= end of a block ="
    # In a file, for AutoGraph reads the source.
    file.write_text("".join(f"{code}\nprint({end!r})\n" for code, _ in BLOCKS))
    names = runpy.run_path(str(file))
    printed = capsys.readouterr().out.split(f"{end}\n")
    assert printed == [*(expected for _, expected in BLOCKS), ""]
    # One graph for each function, whatever the number of steps.
    assert names["step"].experimental_get_tracing_count() == 1
    assert names["steps"].experimental_get_tracing_count() == 1


def test_the_commands_and_the_names_of_the_page(tmp_path):
    commands = re.findall(r"^python -m experiments\.linear(.*)$", PAGE, re.M)
    assert commands == ["", " --policy=mixed_bfloat16"]
    results = mpl.run(Linear, workdir=str(tmp_path), summary_every_steps=0)["test"]
    assert f"w {results['w']:.4f} and b {abs(results['b']):.4f};" in PAGE
    for name in ("MasterWeights", "LossOutput", "LossScaleOptimizer", "Trainer",
                 "Controller", "Experiment"):
        assert f"`{name}" in PAGE and hasattr(mpl, name)
    for flag in re.findall(r"`--(\w+)`", PAGE):
        assert hasattr(mpl.RunConfig, flag), flag
