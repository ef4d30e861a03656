"""A small chart in SVG: two axes, lines, bars, dots, labels that avoid each other. Text is escaped, nothing is loaded.

Hand-made because a report must open anywhere, offline, in a few hundred kilobytes, and print sharply.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from markupsafe import Markup, escape

Point = tuple[float, float]
Box = tuple[float, float, float, float]

INK, FAINT, GRID = "#1f2933", "#5f6b7a", "#e4e7eb"
_LETTER = 6.1  # average width in px of a letter at 11.5 px, for keeping labels apart


def show(value: float | None, signed: bool = False) -> str:
    """A number for people: three or four significant digits, scientific where it is tiny or huge."""
    if value is None:
        return "\u2013"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("\u221e" if value > 0 else "\u2212\u221e")
    size = abs(value)
    if size != 0 and (size < 5e-4 or size >= 1e6):
        mantissa, exponent = f"{size:.1e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    elif size >= 1000:
        text = f"{size:,.0f}".replace(",", "\u202f")
    else:
        text = f"{size:.{1 if size >= 100 else 2 if size >= 10 else 3}f}"
    sign = "\u2212" if value < 0 else ("+" if signed and value > 0 else "")
    return sign + text


def brief(value: float | None) -> str:
    """Three significant digits: for times and sizes, where the digits after the point mean little."""
    if value is None or not math.isfinite(value) or value == 0 or abs(value) >= 1000:
        return show(value) if value != 0 else "0"
    return f"{value:.3g}" if abs(value) >= 1e-3 else show(value)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between low and high: about `count` of them, steps of 1, 2 or 5 times a power of ten."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


class Chart:
    """Axes with a frame of reference; draw in data coordinates, then `str(chart)`.

    x, y: (lowest, highest) of the axes. x_names: names in place of numbers on the x axis, at 0, 1, 2, ...
    alt: what the picture shows, for those who do not see it.
    """

    def __init__(
        self,
        size: tuple[int, int],
        x: Point,
        y: Point,
        x_label: str,
        y_label: str,
        alt: str,
        log_x: bool = False,
        x_names: Sequence[str] | None = None,
    ) -> None:
        self.width, self.height = size
        self.left, self.right, self.top, self.bottom = 64, 14, 12, 44
        self.x, self.y, self.log_x = _spread(x, log_x), _spread(y), log_x
        self.labels, self.alt, self.x_names = (x_label, y_label), alt, x_names
        self.back: list[str] = []
        self.marks: list[str] = []
        self.taken: list[Box] = []

    def px(self, value: float) -> float:
        low, high, value = (_log(v) for v in (*self.x, value)) if self.log_x else (*self.x, value)
        return self.left + (value - low) / (high - low) * (self.width - self.left - self.right)

    def py(self, value: float) -> float:
        low, high = self.y
        return self.height - self.bottom - (value - low) / (high - low) * (self.height - self.top - self.bottom)

    def line(
        self, points: Iterable[Point], colour: str, dash: str = "", width: float = 2.0, opacity: float = 1.0
    ) -> None:
        """A polyline; a point with a NaN interrupts it."""
        runs: list[list[str]] = [[]]
        for x, y in points:
            if math.isfinite(x) and math.isfinite(y):
                runs[-1].append(f"{self.px(x):.1f},{self.py(min(max(y, self.y[0]), self.y[1])):.1f}")
            elif runs[-1]:
                runs.append([])
        style = f' stroke-dasharray="{dash}"' if dash else ""
        style += f' stroke-opacity="{opacity}"' if opacity < 1 else ""
        for run in runs:
            if len(run) == 1:
                cx, cy = run[0].split(",")
                self.marks.append(f'<circle cx="{cx}" cy="{cy}" r="{width}" fill="{colour}"/>')
            elif run:
                self.marks.append(
                    f'<polyline points="{" ".join(run)}" fill="none" stroke="{colour}" stroke-width="{width}"'
                    f'{style} stroke-linejoin="round"/>'
                )

    def area(self, points: Sequence[Point], colour: str) -> None:
        """The ground under a line, faintly filled."""
        base = self.py(self.y[0])
        inner = " ".join(f"{self.px(x):.1f},{self.py(y):.1f}" for x, y in points)
        path = f"{self.px(points[0][0]):.1f},{base:.1f} {inner} {self.px(points[-1][0]):.1f},{base:.1f}"
        self.marks.append(f'<polygon points="{path}" fill="{colour}" fill-opacity="0.14"/>')

    def bar(self, x: float, width: float, value: float, colour: str, title: str) -> None:
        """A bar from the axis to `value`, `width` in units of x, with its left edge at x."""
        top, base = self.py(max(value, self.y[0])), self.py(self.y[0])
        wide = self.px(x + width) - self.px(x)
        self.marks.append(
            f'<rect x="{self.px(x):.1f}" y="{top:.1f}" width="{max(wide - 1, 1):.1f}" '
            f'height="{max(base - top, 0.75):.1f}" '
            f'fill="{colour}"><title>{escape(title)}</title></rect>'
        )

    def rule(self, colour: str, x: float | None = None, y: float | None = None, dash: str = "4 4") -> None:
        """A line across the whole chart at x or at y."""
        x1, x2 = (self.left, self.width - self.right) if x is None else (self.px(x),) * 2
        y1, y2 = (self.top, self.height - self.bottom) if y is None else (self.py(y),) * 2
        self.back.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
            f'stroke="{colour}" stroke-dasharray="{dash}"/>'
        )

    def dot(self, x: float, y: float, radius: float, colour: str, title: str, hollow: bool = False) -> None:
        """A bubble of `radius` px; points outside the axes sit on the edge."""
        cx, cy = self.px(min(max(x, self.x[0]), self.x[1])), self.py(min(max(y, self.y[0]), self.y[1]))
        fill = '#ffffff" fill-opacity="0.9' if hollow else f'{colour}" fill-opacity="0.62'
        self.marks.append(
            f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="{radius:.1f}" fill="{fill}" stroke="{colour}" stroke-width="1.6">'
            f"<title>{escape(title)}</title></circle>"
        )
        self.taken.append((cx - radius, cy - radius, cx + radius, cy + radius))

    def name(self, x: float, y: float, radius: float, text: str, bold: bool = False) -> None:
        """A label beside a dot, at the first place around it that hides nothing placed before."""
        cx, cy = self.px(min(max(x, self.x[0]), self.x[1])), self.py(min(max(y, self.y[0]), self.y[1]))
        wide, gap, best = len(text) * _LETTER, radius + 4, None
        for reach in (gap, gap + 12, gap + 26, gap + 42):
            for dx, dy in ((1, 0), (-1, 0), (0, -1), (0, 1), (0.7, -0.7), (0.7, 0.7), (-0.7, -0.7), (-0.7, 0.7)):
                tx, ty = cx + dx * reach, cy + dy * (reach + 3)
                left = tx if dx > 0 else tx - wide if dx < 0 else tx - wide / 2
                box = (left, ty - 7, left + wide, ty + 7)
                inside = (
                    left > self.left and box[2] < self.width - 2 and box[1] > 2 and box[3] < self.height - self.bottom
                )
                hidden = sum(_overlap(box, other) for other in self.taken) + (0 if inside else 1e6) + reach / 50
                if best is None or hidden < best[0]:
                    best = (hidden, box, reach > gap)
        assert best is not None
        _, box, far = best
        self.taken.append(box)
        if far:
            middle = box[0] + wide / 2
            self.back.append(
                f'<line x1="{cx:.1f}" y1="{cy:.1f}" x2="{middle:.1f}" y2="{box[1] + 7:.1f}" '
                'stroke="#9aa5b1" stroke-width="0.8"/>'
            )
        self.marks.append(_text(box[0], box[1] + 11, text, weight=600 if bold else 400, halo=True))

    def __str__(self) -> str:
        axes = [*self._x_axis(), *self._y_axis()]
        parts = "".join([*axes, *self.back, *self.marks])
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(self.alt)}" '
            f'xmlns="http://www.w3.org/2000/svg" font-size="11.5">{parts}</svg>'
        )

    def markup(self) -> Markup:
        return Markup(str(self))  # every text in it went through `escape`

    def _x_axis(self) -> list[str]:
        floor = self.height - self.bottom
        parts = [f'<line x1="{self.left}" y1="{floor}" x2="{self.width - self.right}" y2="{floor}" stroke="#9aa5b1"/>']
        if self.x_names is not None:
            every = max(1, math.ceil(len(self.x_names) / max(1, (self.width - self.left) // 26)))
            marks = [(float(i), name) for i, name in enumerate(self.x_names) if i % every == 0]
        else:
            marks = [(value, self._x_text(value)) for value in self._x_ticks()]
        for value, text in marks:
            parts.append(_text(self.px(value), floor + 16, text, anchor="middle", colour=FAINT))
        middle = (self.left + self.width - self.right) / 2
        return [*parts, _text(middle, self.height - 8, self.labels[0], anchor="middle", colour=FAINT)]

    def _x_ticks(self) -> list[float]:
        if not self.log_x:
            return ticks(*self.x)
        low, high = (math.floor(_log(self.x[0])), math.ceil(_log(self.x[1])))
        every = max(1, math.ceil((high - low) / 5))
        return [
            10.0**e
            for e in range(low, high + 1, every)
            if self.x[0] <= 10.0**e * 1.001 and 10.0**e <= self.x[1] * 1.001
        ]

    def _x_text(self, value: float) -> str:
        return _power(value) if self.log_x else _short(value)

    def _y_axis(self) -> list[str]:
        parts = []
        for value in ticks(*self.y, count=max(3, self.height // 60)):
            y = self.py(value)
            parts.append(
                f'<line x1="{self.left}" y1="{y:.1f}" x2="{self.width - self.right}" y2="{y:.1f}" stroke="{GRID}"/>'
            )
            parts.append(_text(self.left - 7, y + 4, _short(value), anchor="end", colour=FAINT))
        middle = (self.top + self.height - self.bottom) / 2
        turn = f' transform="rotate(-90 13 {middle:.0f})"'
        return [*parts, _text(13, middle, self.labels[1], anchor="middle", colour=FAINT, extra=turn)]


def grouped(values: Sequence[float], reach: Callable[[float], float], edges: Sequence[float]) -> list[float]:
    """Share of the values in each bin; what lies outside counts in the first or last."""
    counts = [0] * (len(edges) - 1)
    low, high = reach(edges[0]), reach(edges[-1])
    for value in values:
        place = int((reach(value) - low) / (high - low) * len(counts))
        counts[min(max(place, 0), len(counts) - 1)] += 1
    return [count / len(values) for count in counts]


def _spread(pair: Point, log: bool = False) -> Point:
    """Axes need a width: a single value gets room on both sides."""
    low, high = pair
    if high > low:
        return pair
    return (low / 2, low * 2) if log else (low - (abs(low) * 0.05 or 0.5), low + (abs(low) * 0.05 or 0.5))


def _log(value: float) -> float:
    return math.log10(max(value, 1e-300))


def _short(value: float) -> str:
    return f"{value:.6g}".replace("-", "\u2212")


def _power(value: float) -> str:
    exponent = round(_log(value))
    if -3 <= exponent <= 3:
        return f"{value:g}"
    raised = str(exponent).translate(
        str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")
    )
    return f"10{raised}"


def _overlap(one: Box, other: Box) -> float:
    wide, high = min(one[2], other[2]) - max(one[0], other[0]), min(one[3], other[3]) - max(one[1], other[1])
    return max(wide, 0.0) * max(high, 0.0)


def _text(
    x: float,
    y: float,
    text: str,
    anchor: str = "start",
    colour: str = INK,
    weight: int = 400,
    halo: bool = False,
    extra: str = "",
) -> str:
    outline = ' stroke="#ffffff" stroke-width="3" paint-order="stroke" stroke-linejoin="round"' if halo else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" font-weight="{weight}"{outline}{extra}>'
        f"{escape(text)}</text>"
    )
