"""The one chart: lines over labels or over steps, as SVG, which a page holds as it is and a browser shows."""
import html
import math

COLOURS = {"none": "#999999", "described": "#e7298a", "front": "#d95f02", "front+left": "#7570b3",
           "all": "#1b9e77", "this checkpoint": "#1b9e77", "its stage 1": "#999999", "training": "#999999"}
OTHER_COLOURS = ("#1b9e77", "#d95f02", "#7570b3", "#e7298a", "#66a61e", "#a6761d", "#444444")


def tick_values(low, high, most=math.inf):
    """Round numbers from at most `low` to at least `high`, 1, 2 or 5 of a power of ten apart; none is above
    `most`, a round number that `high` may exceed in its last digits."""
    low, high = min(low, most), min(high, most)
    span = high - low or 1
    step = 10 ** math.floor(math.log10(span / 2))
    step *= next(m for m in (1, 2, 5, 10) if span / (m * step) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if first == last:
        first, last = (first - 1, last) if high == most else (first, last + 1)
    return [i * step for i in range(first, last + 1)]


def plot(heading, labels, series, percent=False, most=math.inf, log=False):
    """Values with their intervals -> the text of an SVG picture, "" where there are none.

    labels   what stands below the axis: a list, or {x: text} where x is a number of steps
    series   {name: (mean, low, high) or None per label}, or {name: {x: (mean, low, high)}}
    percent  0..1 is shown as per cent; most: what no value exceeds; log: values are log10 of what is shown"""
    if steps := isinstance(labels, dict):
        W, H, left, shift_by = 900, 420, 60, 0.0
    else:
        labels, W, H, left, shift_by = dict(enumerate(labels)), 430, 250, 46, 0.09
        series = {name: {i: e for i, e in enumerate(values) if e} for name, values in series.items()}
    series = {name: values for name, values in series.items() if values}
    ends = [v for values in series.values() for e in values.values() for v in e if math.isfinite(v)]
    if not ends:
        return ""
    ticks = tick_values(min(ends), max(ends), 1 if percent else most)
    top, bottom, right, factor = 26, 40, 10, 100 if percent else 1
    first, last = (0, max(max(values) for values in series.values())) if steps else (-0.5, len(labels) - 0.5)

    def x(place):
        return left + (place - first) / max(last - first, 1) * (W - left - right)

    def y(value):
        return top + (ticks[-1] - value) / (ticks[-1] - ticks[0]) * (H - top - bottom)
    parts = [f'<text x="{left}" y="14" font-weight="bold">{html.escape(heading)}</text>']
    for v in ticks:
        text = f"{10**v if log else factor * v:.3g}"
        parts.append(f'<line x1="{left}" x2="{W - right}" y1="{y(v):.1f}" y2="{y(v):.1f}" stroke="#eee"/>'
                     f'<text x="{left - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{text}</text>')
    anchor = "start" if steps else "middle"
    parts += [f'<text x="{x(place):.1f}" y="{H - bottom + 16}" text-anchor="{anchor}">'
              f'{html.escape(label)}</text>' for place, label in labels.items()]
    room = min(95, (W - left) / max(1, len(series)))  # of a name below
    for s, (name, values) in enumerate(series.items()):
        shift, points = (s - (len(series) - 1) / 2) * shift_by, []
        colour = COLOURS.get(name, OTHER_COLOURS[s % len(OTHER_COLOURS)])
        for place, (mean, low, high) in values.items():
            at = f"{x(place + shift):.1f}"
            points.append(f"{at},{y(mean):.1f}")
            if math.isfinite(low):
                parts.append(f'<line x1="{at}" x2="{at}" y1="{y(low):.1f}" y2="{y(high):.1f}" '
                             f'stroke="{colour}"/>')
            if len(values) < 100:  # training's points are too many to show one by one
                parts.append(f'<circle cx="{at}" cy="{y(mean):.1f}" r="3.5" fill="{colour}"/>')
        parts.append(f'<polyline fill="none" stroke="{colour}" points="{" ".join(points)}"/>'
                     f'<text x="{left + s * room:.0f}" y="{H - 6}" fill="{colour}">&#9679; '
                     f'{html.escape(name[:15])}<title>{html.escape(name)}</title></text>')
    return (f'<svg width="{W}" height="{H}" viewBox="0 0 {W} {H}" '
            f'font-family="sans-serif" font-size="11" style="background: white">{"".join(parts)}</svg>')
