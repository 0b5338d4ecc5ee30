"""Estimated steps as stacked bars, in SVG."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from .estimate import FAMILIES

COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#edc948", "#b07aa1", "#9c755f", "#bab0ac")
WIDTH, BAR, GAP, LEFT, TOP = 900, 16, 6, 250, 60


def bars(title: str, rows: Sequence[tuple[str, dict[str, float], float]]) -> str:
    """A bar per row, in milliseconds: its label, its parts by family, and the floor, drawn as a line."""
    scale = (WIDTH - LEFT - 70) / max(sum(parts.values()) for _, parts, _ in rows)
    height = TOP + len(rows) * (BAR + GAP) + 20
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="10" y="20" font-size="15">{escape(title)}</text>',
    ]
    x = 10.0
    for family, colour in zip(FAMILIES, COLOURS, strict=True):
        lines.append(f'<rect x="{x:.0f}" y="32" width="12" height="12" fill="{colour}"/>')
        lines.append(f'<text x="{x + 16:.0f}" y="43">{escape(family)}</text>')
        x += 32 + 7 * len(family)
    lines.append(f'<path d="M{x:.0f} 31v14" stroke="black" stroke-width="2"/>')
    lines.append(f'<text x="{x + 6:.0f}" y="43">floor</text>')
    for number, (label, parts, floor) in enumerate(rows):
        y = TOP + number * (BAR + GAP)
        lines.append(f'<text x="{LEFT - 8}" y="{y + 12}" text-anchor="end">{escape(label)}</text>')
        x = float(LEFT)
        for family, colour in zip(FAMILIES, COLOURS, strict=True):
            width = parts[family] * scale
            lines.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{colour}"/>')
            x += width
        lines.append(f'<text x="{x + 5:.1f}" y="{y + 12}">{sum(parts.values()):.1f}</text>')
        at = LEFT + floor * scale
        lines.append(f'<path d="M{at:.1f} {y - 1}v{BAR + 2}" stroke="black" stroke-width="2"/>')
    return "\n".join([*lines, "</svg>"]) + "\n"
