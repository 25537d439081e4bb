"""A small line chart in braille dots, for a terminal or a log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.text import Text

_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""Bit of a braille cell by column (2) and row from the top (4); the block begins at U+2800."""


class Series(NamedTuple):
    """One curve."""

    label: str
    points: Sequence[tuple[float, float]]
    """(x, y), x rising."""
    style: str
    """A rich style."""
    marker: str | None = None
    """A character drawn at each point, or None for a line of dots."""


def chart(series: Sequence[Series], *, width: int, height: int) -> Text:
    """Draw ``series`` over shared axes, ``width`` x ``height`` characters without the labels.

    Later series are drawn over earlier ones. At least one of them has a point.
    """
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    cells: dict[tuple[int, int], tuple[str, str]] = {}  # (row, column) -> character, style

    def place(x: float, y: float, columns: int, rows: int) -> tuple[int, int]:
        across = (x - left) / (right - left) if right > left else 0.0
        return round(across * (columns - 1)), round((high - y) / (high - low) * (rows - 1))

    for one in series:
        if one.marker is None:
            dots = [place(x, y, width * 2, height * 4) for x, y in one.points]
            for cell, bits in _line(dots).items():
                cells[cell] = (chr(0x2800 + bits), one.style)
        else:
            for x, y in one.points:
                column, row = place(x, y, width, height)
                cells[row, column] = (one.marker, one.style)
    return _frame(series, cells, (left, right, low, high), width=width, height=height)


def _line(dots: list[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """Braille bits of a polyline through ``dots`` (column, row), by character cell."""
    cells: dict[tuple[int, int], int] = {}
    for (x0, y0), (x1, y1) in zip(dots, dots[1:] or dots, strict=False):
        count = max(abs(x1 - x0), abs(y1 - y0), 1)
        for i in range(count + 1):
            x, y = round(x0 + (x1 - x0) * i / count), round(y0 + (y1 - y0) * i / count)
            cell = (y // 4, x // 2)
            cells[cell] = cells.get(cell, 0) | _DOTS[x % 2][y % 4]
    return cells


def _frame(
    series: Sequence[Series],
    cells: dict[tuple[int, int], tuple[str, str]],
    bounds: tuple[float, float, float, float],
    *,
    width: int,
    height: int,
) -> Text:
    left, right, low, high = bounds
    text = Text()
    for row in range(height):
        labelled = row in (0, height - 1) or row * 2 == height
        value = high - (high - low) * row / (height - 1)
        text.append(f"  {value:6.2f} ┤" if labelled else "         │", style="dim")
        last = max((column for r, column in cells if r == row), default=-1)
        for column in range(last + 1):
            text.append(*cells.get((row, column), (" ", "")))
        text.append("\n")
    text.append(f"         └{'─' * width}\n", style="dim")
    ends = f"{left:<{width - 12}.0f}{right:>12.0f}"
    text.append(f"          {ends}\n", style="dim")
    text.append("          ")
    for one in series:
        text.append("" if one is series[0] else "   ")
        text.append(f"{one.marker or '⠤⠤'} ", style=one.style)
        text.append(one.label, style="dim")
    return text.append("\n")
