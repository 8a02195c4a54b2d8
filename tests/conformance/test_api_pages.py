"""docs/api says what the docstrings say; run as a script, this writes it anew."""

import ast
import contextlib
import functools
import importlib
import inspect
import io
import os
import pathlib
import re
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import mpl  # noqa: E402

API = ROOT / "docs" / "api"
PACKAGES = ("mpl", "mpl.precision", "mpl.step", "mpl.loop", "mpl.data",
            "mpl.distribute", "mpl.record")
_HEAD = re.compile(r"(Args|Attributes|Returns|Yields|Raises):$")
_WIDTH = 88


@functools.cache
def _definitions(module):
    """The nodes of a module's classes and functions by name."""
    source = pathlib.Path(sys.modules[module].__file__).read_text(encoding="utf-8")
    return {node.name: node for node in ast.parse(source).body
            if isinstance(node, ast.ClassDef | ast.FunctionDef)}


def _escaped(text):
    """Markdown that shows a text as it is, code in backquotes aside."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(part if part.startswith("`") else re.sub(r"([*<])", r"\\\1", part)
                   for part in parts)


def _entries(lines):
    """A list of `name: text` entries; what has no name is an entry by itself."""
    entries = []
    for line in textwrap.dedent("\n".join(lines)).splitlines():
        if line[:1].strip():
            entries.append(line)
        else:
            entries[-1] += f" {line.strip()}"
    for entry in entries:
        name, colon, text = entry.partition(": ")
        if colon and re.fullmatch(r"[\w*, ]+", name):
            name = ", ".join(f"`{each}`" for each in name.split(", "))
            yield f"- {name}: {_escaped(text)}"
        else:
            yield f"- {_escaped(entry)}"


def markdown(doc):
    """Google style docstring to Markdown."""
    parts = []
    # What stands at the left edge, and the lines below it that are indented.
    for chunk in re.split(r"\n\n(?=\S)", doc):
        lines = chunk.splitlines()
        while lines:
            cut = next((n for n, line in enumerate(lines) if _HEAD.match(line)), None)
            if cut == 0:
                end = next((n for n, line in enumerate(lines[1:], 1)
                            if line[:1].strip()), len(lines))
                head, body = lines[0][:-1], lines[1:end]
                if head in ("Returns", "Yields"):
                    parts.append(f"**{head}:** {_escaped(' '.join(body))}")
                else:
                    parts += [f"**{head}**", "\n".join(_entries(body))]
                lines = lines[end:]
            else:
                parts += _paragraphs(lines[:cut])
                lines = lines[cut:] if cut else []
    return "\n\n".join(parts)


def _paragraphs(lines):
    if lines[0].startswith("Source: "):
        return [_escaped(" ".join(lines))]
    is_code, groups = False, []
    for line in lines:
        indented = not line.strip() and is_code or line.startswith("  ")
        if not groups or indented != is_code:
            groups.append([])
        is_code = indented
        groups[-1].append(line)
    return [_code(group) if group[0].startswith("  ") else _escaped(" ".join(group))
            for group in groups if "".join(group).strip()]


def _code(lines):
    text = textwrap.dedent("\n".join(lines)).strip("\n")
    return f"```text\n{text}\n```"


def _signature(name, node, is_method=False):
    arguments = _arguments(node.args)
    static = any(ast.unparse(each) == "staticmethod" for each in node.decorator_list)
    if is_method and not static:
        arguments = arguments[1:]
    returns = node.returns
    if isinstance(returns, ast.Constant) and isinstance(returns.value, str):
        returns = ast.parse(returns.value).body[0].value
    after = f" -> {ast.unparse(returns)}" if returns and node.name != "__init__" else ""
    return _wrapped(name, arguments, after)


def _arguments(node):
    """Each argument as it is written: `name: type = default`."""
    nothing = [None] * (len(node.args) - len(node.defaults))
    found = [_argument(*each) for each in zip(node.args, [*nothing, *node.defaults])]
    if node.vararg or node.kwonlyargs:
        found.append("*" + (_argument(node.vararg, None) if node.vararg else ""))
    found += [_argument(*each) for each in zip(node.kwonlyargs, node.kw_defaults)]
    return found + ([f"**{_argument(node.kwarg, None)}"] if node.kwarg else [])


def _argument(node, default):
    text = node.arg
    if node.annotation:
        text += f": {ast.unparse(node.annotation)}"
    equals = " = " if node.annotation else "="
    return text if default is None else f"{text}{equals}{ast.unparse(default)}"


def _wrapped(name, arguments=None, after=""):
    if arguments is None:
        return _code([name])
    lines = textwrap.wrap(  # between arguments alone
        f"{name}({', '.join(each.replace(' ', '~') for each in arguments)})"
        f"{after.replace(' ', '~')}", _WIDTH, subsequent_indent="    ",
        break_on_hyphens=False, break_long_words=False)
    return _code([line.replace("~", " ") for line in lines])


def _class_signature(name, value):
    for base in value.__mro__:
        if base.__module__.partition(".")[0] != "mpl":
            continue
        node = _definitions(base.__module__)[base.__name__]
        for member in node.body:
            if isinstance(member, ast.FunctionDef) and member.name == "__init__":
                return _signature(name, member, is_method=True)
        fields = [member for member in node.body if isinstance(member, ast.AnnAssign)]
        if tuple in value.__mro__ or "dataclass" in str(
                [ast.unparse(each) for each in node.decorator_list]):
            if len(fields) > 10:
                return _wrapped(name, ["**settings"])
            return _wrapped(name, list(map(ast.unparse, fields)))
    return _wrapped(name)


def _members(name, value):
    for node in _definitions(value.__module__)[value.__name__].body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        doc = ast.get_docstring(node)
        if doc is None:
            continue
        yield f"#### {name}.{node.name}"
        if any(ast.unparse(each) == "property" for each in node.decorator_list):
            yield "A property."
        else:
            yield _signature(node.name, node, is_method=True)
        yield markdown(doc)


def _parts(package, name):
    value = getattr(sys.modules[package], name)
    yield f"## {name}"
    if not hasattr(value, "__module__") or not inspect.isroutine(value) and (
            not inspect.isclass(value)):
        yield f"`{name} = {value}`"
        return
    if package != "mpl" and getattr(mpl, name, None) is value:
        yield f"See [mpl.{name}](mpl.md#{name.lower()})."
        return
    node, full = _definitions(value.__module__)[value.__name__], f"{package}.{name}"
    if inspect.isclass(value):
        yield _class_signature(full, value)
        bases = [base.__name__ for base in value.__bases__
                 if base.__name__ in mpl.__all__ or base.__name__ == "LossScale"]
        if bases:
            yield f"A `{bases[0]}`."
    else:
        yield _signature(full, node)
    yield markdown(ast.get_docstring(node))
    if inspect.isclass(value):
        yield from _members(name, value)


def package_page(package):
    """The page of a package: what is in its `__all__`."""
    module = importlib.import_module(package)
    if not hasattr(module, "__all__"):  # its names are those of mpl
        own = [name for name in mpl.__all__
               if getattr(mpl, name).__module__.startswith(f"{package}.")]
        links = ", ".join(f"[{name}](mpl.md#{name.lower()})" for name in own)
        names = [f"Its public names are names of `mpl`: {links}."]
    else:
        names = [part for name in module.__all__ for part in _parts(package, name)]
    tree = ast.parse(pathlib.Path(module.__file__).read_text(encoding="utf-8"))
    return "\n\n".join([f"# {package}", markdown(ast.get_docstring(tree)), *names])


def tools_page():
    """The help of every command, beside those of experiments."""
    parts = ["# Commands", "Each prints this with `--help`; the flags of an experiment "
             "are in the [README](../../README.md#flags)."]
    files = [ROOT / "mpl" / "launch" / "local.py",
             *sorted((ROOT / "mpl" / "tools").glob("*.py"))]
    for file in files:
        if "\ndef main(" in file.read_text(encoding="utf-8"):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            parts += [f"## {name}", _code(_help(name).splitlines())]
    return "\n\n".join(parts)


def _help(name):
    columns, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), "80"
    try:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            with contextlib.suppress(SystemExit):
                importlib.import_module(name).main(["--help"])
    finally:
        del os.environ["COLUMNS"]
        if columns is not None:
            os.environ["COLUMNS"] = columns
    return output.getvalue()


def pages():
    """The text of each page by file name."""
    found = {f"{package.rpartition('.')[2]}.md": package_page(package)
             for package in PACKAGES}
    return {name: f"{text.rstrip()}\n" for name, text in
            {**found, "commands.md": tools_page()}.items()}


@pytest.mark.parametrize("name", [
    *(f"{package.rpartition('.')[2]}.md" for package in PACKAGES), "commands.md"])
def test_the_page_is_that_of_the_code(name):
    assert (API / name).read_text(encoding="utf-8") == pages()[name], (
        "run python tests/conformance/test_api_pages.py to write the pages anew")


def test_there_are_no_other_pages():
    assert {path.name for path in API.iterdir()} == set(pages())


def test_every_public_name_is_there_with_its_arguments():
    text = pages()["mpl.md"]
    heads = re.findall(r"^## (\w+)$", text, re.MULTILINE)
    assert heads == mpl.__all__
    assert "mpl.StaticLossScale(value: float)" in text
    assert "mpl.NoLossScale()" in text
    assert "mpl.LossOutput(per_example: tf.Tensor, weights: tf.Tensor, " in text
    assert "mpl.TrainerOptions(use_tf_function: bool = True, " in text
    assert "mpl.RunConfig(**settings)" in text
    assert "apply(gradients: Sequence[tf.Tensor | tf.IndexedSlices]," in text
    assert "transform: Transform | None = None)" in text


def test_docstrings_become_markdown():
    doc = inspect.cleandoc("""Does this
        and *that* with `a * b`.

            first
                second

            third

        Then more.

        Args:
            one, two: a number
                on two lines.
            **rest: whatever.

        Returns:
          A thing,
          or none.

        Raises:
            ConfigError, CheckpointError: see below.
            if it is free text.
        Source: Someone 2020,
          https://a.b/c
        """)
    assert markdown(doc) == inspect.cleandoc(r"""Does this and \*that\* with `a * b`.

        ```text
        first
            second

        third
        ```

        Then more.

        **Args**

        - `one`, `two`: a number on two lines.
        - `**rest`: whatever.

        **Returns:** A thing, or none.

        **Raises**

        - `ConfigError`, `CheckpointError`: see below.
        - if it is free text.

        Source: Someone 2020, https://a.b/c""")


if __name__ == "__main__":
    made = pages()
    API.mkdir(exist_ok=True)
    for old in API.iterdir():
        old.unlink()
    for file_name, content in made.items():
        (API / file_name).write_text(content, encoding="utf-8")
