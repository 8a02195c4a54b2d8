"""Links between the pages lead somewhere; code in docs/ is as wide as the rest."""

import os
import re

import pages
import pytest

PAGES = ["README.md", *(f"docs/{name}" for name in os.listdir(pages.ROOT / "docs"))]


def anchors(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.S | re.M)
    heads = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", head).strip().lower().replace(" ", "-")
            for head in heads}


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    path = pages.ROOT / page
    for target in re.findall(r"\]\(([^)#\s]*#?[^)\s]*)\)", path.read_text("utf-8")):
        if "://" not in target:
            file, _, anchor = target.partition("#")
            there = (path.parent / file).resolve() if file else path
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", PAGES[1:])
def test_code_is_at_most_88_wide(page):
    for code in re.findall(r"^```python\n(.*?)^```$",
                           (pages.ROOT / page).read_text("utf-8"), re.S | re.M):
        assert max(map(len, code.splitlines())) <= 88
