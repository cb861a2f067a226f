"""Bars as an SVG file: groups of a few named values each, less is better."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

_COLOURS = ["#1b6ca8", "#9aa5b1", "#c2c9d0", "#7b8794", "#e0a458", "#b56576"]
_WIDTH, _NAMES, _BAR, _GAP = 720, 190, 18, 14


def write_bars(file: Path, title: str, groups: Mapping[str, Mapping[str, float]]) -> None:
    """groups: of each group its bars, drawn in proportion to its longest one. A name has the same
    colour in all."""
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    parts, y = [_text(0, 16, title, "bold")], 40
    for group, bars in groups.items():
        parts.append(_text(0, y + _BAR - 5, group, "bold"))
        y += _BAR + 4
        longest = max(bars.values())
        for name, value in bars.items():
            width = (_WIDTH - _NAMES - 70) * value / longest
            place = f'x="{_NAMES}" y="{y}" width="{width:.1f}" height="{_BAR - 4}"'
            parts += [
                _text(0, y + _BAR - 7, name),
                f'<rect {place} fill="{colours[name]}"/>',
                _text(_NAMES + width + 6, y + _BAR - 7, f"{value:.2f}"),
            ]
            y += _BAR
        y += _GAP
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y}"'
    style = 'font-family="sans-serif" font-size="12"'
    body = "\n".join(parts)
    file.write_text(
        f'{head} {style}>\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _text(x: float, y: float, text: str, weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y}" font-weight="{weight}">{escape(text)}</text>'
