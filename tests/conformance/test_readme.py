"""The README says what the code does: its flags, its code, its commands."""

import pathlib
import re
import sys

import mpl
from mpl.launch.config import RunConfig, fields_of
from mpl.launch.option import rule, written

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def flag_table() -> str:
    """Returns the README's table of flags."""
    rows = ["| flag | default | what |", "|---|---|---|"]
    for field in fields_of(RunConfig):
        metadata = field.metadata
        words = metadata["help"].replace("|", "\\|")
        if metadata["choices"]:
            words += f" ({rule(field)})"
        rows.append(f"| `--{field.name}` | {written(field.default)} | {words} |")
    return "\n".join(rows)


def test_the_table_of_flags_is_that_of_the_code():
    between = README.split("<!-- flags: begin -->")[1].split("<!-- flags: end -->")[0]
    assert between.strip() == flag_table(), (
        "run python tests/conformance/test_readme.py to write the table anew")


def test_the_experiment_of_the_readme_runs_as_in_a_notebook(tmp_path):
    code = re.search(r"```python\n(import keras.*?)```", README, re.S)[1]
    body = code.split('if __name__')[0]
    lines = [line for line in body.splitlines() if line.strip()]
    assert len(lines) <= 40
    names: dict = {"__name__": "readme"}
    exec(compile(body, "README.md", "exec"), names)
    results = mpl.run(names["Digits"], policy="mixed_bfloat16", train_steps=100,
                      workdir=str(tmp_path / "run"))
    assert results["test"]["accuracy"] > 0.8


def test_the_commands_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([a-z-]+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target
    for module in re.findall(r"python -m (experiments\.\w+)", README):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists()


if __name__ == "__main__":
    before, rest = README.split("<!-- flags: begin -->")
    after = rest.split("<!-- flags: end -->")[1]
    new = f"{before}<!-- flags: begin -->\n{flag_table()}\n<!-- flags: end -->{after}"
    (ROOT / "README.md").write_text(new, encoding="utf-8")
    sys.exit()
