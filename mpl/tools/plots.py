"""Pictures: a figure of a few panels, as the bytes of a PNG."""

import importlib.util
import io
import math
from collections.abc import Iterable
from typing import Any

from mpl.errors import ConfigError


def check() -> None:
    """Looks whether pictures can be drawn.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "The pictures are drawn by matplotlib, which is not installed.",
            "Install the extra `plots`: pip install 'mpl[plots]'.",
        )


def figure(title: str, num_panels: int) -> tuple[Any, list[Any]]:
    """Returns a figure and its panels, two in a row."""
    import matplotlib.figure

    rows, columns = math.ceil(num_panels / 2), min(num_panels, 2)
    size = (6.0 * columns, 0.8 + 3.2 * rows)
    drawn = matplotlib.figure.Figure(figsize=size, layout="constrained")
    drawn.suptitle(plain(title))
    panels = list(drawn.subplots(rows, columns, squeeze=False).ravel())
    for empty in panels[num_panels:]:
        empty.remove()
    for panel in panels[:num_panels]:
        panel.grid(alpha=0.25)
    return drawn, panels[:num_panels]


def legend(drawn: Any, entries: Iterable[tuple[str, dict[str, Any]]]) -> None:
    """Explains, below the panels, what lines of each style mean."""
    from matplotlib.lines import Line2D

    names, styles = zip(*entries)
    handles = [Line2D([], [], **style) for style in styles]
    columns = 1 if max(map(len, names)) > 40 else min(4, len(names))
    drawn.legend(handles, map(plain, names), loc="outside lower center",
                 ncols=columns, frameon=False, fontsize="small")


def from_zero(panel: Any) -> None:
    """Lets the vertical axis of a panel begin at 0, with room above the data."""
    panel.axhline(0, color="none")
    panel.set_ylim(bottom=0)


def png(drawn: Any) -> bytes:
    """Returns a figure as the bytes of a PNG."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def plain(text: str) -> str:
    """Returns text that matplotlib shows as it is."""
    return text.replace("$", r"\$")  # which would begin a formula
