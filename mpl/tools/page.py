"""One HTML page that needs no other file, no network and no script."""

import base64
import html
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tensorflow as tf

# Nothing but pictures inside the page, even if a text slipped through unescaped.
_HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; }}
img {{ max-width: 100%; height: auto; margin: 1rem 0; }}
div {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 0.9rem; }}
th, td {{ padding: 0.3rem 0.8rem; border-bottom: 1px solid #ddd; text-align: right;
          overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }}
th:first-child {{ text-align: left; font-weight: normal; }}
thead th {{ font-weight: 600; border-bottom: 2px solid #222; }}
th[colspan] {{ font-weight: 600; padding-top: 1rem; }}
pre {{ overflow-x: auto; background: #f6f6f6; padding: 0.8rem; font-size: 0.85rem; }}
</style>
<h1>{title}</h1>
"""


def page(title: str, *parts: str) -> str:
    """Returns a page of parts that the functions below make."""
    return "\n".join([_HEAD.format(title=html.escape(title)), *parts, "</html>\n"])


def paragraph(text: str) -> str:
    """Returns a paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>"


def details(title: str, text: str) -> str:
    """Returns lines of plain text that a click on the title shows."""
    title, text = html.escape(title), html.escape(text)
    return f"<details><summary>{title}</summary><pre>{text}</pre></details>"


def picture(png: bytes, title: str) -> str:
    """Returns a PNG as part of the page; the title stands for it where none is seen."""
    content = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{content}">'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table of plain texts; a row of one cell is the title of those below."""
    lines = ["".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)]
    for first, *cells in rows:
        scope = 'scope="row"' if cells else f'colspan="{len(head)}"'
        row = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        lines.append(f"<th {scope}>{html.escape(first)}</th>{row}")
    body = "\n".join(f"<tr>{line}</tr>" for line in lines[1:])
    return (f"<div><table><thead><tr>{lines[0]}</tr></thead>\n"
            f"<tbody>{body}</tbody></table></div>")


def number(value: Any) -> str:
    """Returns a number in four digits or, from 1,000 up, to the unit."""
    if value is None or math.isnan(value):
        return "–"
    whole = math.isfinite(value) and (value == int(value) or abs(value) >= 1000)
    return f"{value:,.0f}" if whole else f"{value:.4g}"


def write(folder: str, files: Mapping[str, str | bytes]) -> None:
    """Writes files by name into a folder, each replaced at once."""
    tf.io.gfile.makedirs(folder)
    for name, content in files.items():
        path = os.path.join(folder, name)
        data = content.encode() if isinstance(content, str) else content
        with tf.io.gfile.GFile(f"{path}.tmp", "wb") as file:
            file.write(data)
        tf.io.gfile.rename(f"{path}.tmp", path, overwrite=True)
