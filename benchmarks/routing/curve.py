"""A line plot as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 420, 60, 36, 210, 48
COLOURS = ("#0b5cad", "#c2410c", "#15803d", "#7e22ce", "#a16207", "#0e7490")
MOST_POINTS = 300


def line_plot(title: str, x_label: str, y_label: str, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
              y_most: float = 1.0) -> str:
    """An SVG of lines by name, x from 0 to 1 and y from 0 to `y_most`; larger values are cut off there."""
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> str:
        return f"{LEFT + x * width:.1f},{TOP + (1 - min(y, y_most) / y_most) * height:.1f}"

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
             f'font-family="sans-serif" font-size="12">', f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
             f'<text x="{LEFT}" y="20" font-size="14">{escape(title)}</text>']
    for i in range(6):
        share = i / 5
        x, y = LEFT + share * width, TOP + (1 - share) * height
        parts += [f'<path d="M{x:.1f} {TOP}V{TOP + height}M{LEFT} {y:.1f}H{LEFT + width}" stroke="#ddd" fill="none"/>',
                  f'<text x="{x:.1f}" y="{TOP + height + 16}" text-anchor="middle">{share:.1f}</text>',
                  f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{share * y_most:.2f}</text>']
    parts += [f'<text x="{LEFT + width / 2}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x_label)}</text>',
              f'<text transform="translate(14 {TOP + height / 2}) rotate(-90)" text-anchor="middle">'
              f'{escape(y_label)}</text>']
    for number, (name, (xs, ys)) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        step = max(1, len(xs) // MOST_POINTS)
        kept = sorted({*range(0, len(xs), step), len(xs) - 1}) if len(xs) else []
        points = " ".join(place(xs[i], ys[i]) for i in kept)
        y = TOP + 14 + 18 * number
        parts += [f'<polyline points="{points}" stroke="{colour}" stroke-width="2" fill="none"/>',
                  f'<path d="M{WIDTH - RIGHT + 12} {y - 4}h18" stroke="{colour}" stroke-width="2"/>',
                  f'<text x="{WIDTH - RIGHT + 36}" y="{y}">{escape(name)}</text>']
    return "\n".join([*parts, "</svg>"]) + "\n"
