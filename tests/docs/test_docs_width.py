"""Code in docs/ is as wide as the rest."""

import re

import pages
import pytest

PAGES = sorted((pages.ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_is_at_most_88_wide(page):
    for code in re.findall(
            r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.S | re.M):
        assert max(map(len, code.splitlines())) <= 88
