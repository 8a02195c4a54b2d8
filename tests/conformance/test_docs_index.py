"""Every page can be reached, and no link leads nowhere."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [*DOCS, ROOT / "README.md", ROOT / "SECURITY.md"]
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def _name(path):
    return str(path.relative_to(ROOT))


def _prose(path):
    """A page without its blocks of code."""
    text = path.read_text(encoding="utf-8")
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)


def links(path):
    """Where a page's links lead, code aside."""
    return _LINK.findall(re.sub(r"`[^`\n]*`", "code", _prose(path)))


def anchors(path):
    """The names that GitHub gives to a page's headings."""
    found = []
    for title in re.findall(r"^#+ +(.*?) *$", _prose(path), re.MULTILINE):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()
        slug = re.sub(r"[^\w\- ]", "", title).replace(" ", "-")
        count = sum(each == slug or re.fullmatch(rf"{re.escape(slug)}-\d+", each)
                    is not None for each in found)
        found.append(f"{slug}-{count}" if count else slug)
    return found


def dead(path):
    """The links of a page to files and headings that there are not."""
    for link in links(path):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (
                anchor and target.suffix == ".md" and anchor not in anchors(target)):
            yield link


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_no_link_is_dead(path):
    assert list(dead(path)) == []


def test_the_index_names_every_page():
    index = ROOT / "docs" / "README.md"
    named = {(index.parent / link).resolve() for link in links(index)}
    assert [_name(path) for path in DOCS if path != index and path not in named] == []


def test_dead_links_are_found(tmp_path):
    (tmp_path / "b.md").write_text("# One `two`, three\n\n## Same\n\n## Same\n")
    path = tmp_path / "a.md"
    path.write_text("# A\n[x](b.md) [x](b.md#one-two-three) [x](b.md#same-1) [x](#a)\n"
                    "[`b`](b.md#same) [x](https://a.b/c)\n`[x](none.md)`\n"
                    "```\n[x](none.md)\n# None\n```\n[x](c.md) "
                    "[x](b.md#two) [x](#none)")
    assert list(dead(path)) == ["c.md", "b.md#two", "#none"]
