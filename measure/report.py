"""What both benchmarks share: metrics of results, means with intervals, tables, and report.html.

A result is a dict with a "case" and "people", one dict per person; a Metric reads its values out of such a
dict. Values of one case are averaged first, then cases: intervals are 95 %, by bootstrap over cases. Results
are kept as lines of JSON, each appended as soon as it is there. No text of a result becomes markup.
"""
import base64
import contextlib
import hashlib
import html
import io
import json
import math
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from support.script import UserError, atomic_file, lock, naming, read_lines, take_lock

YAW_BINS = ((0, 30), (30, 60), (60, 100), (100, 181))
BIN_NAMES = [f"{low}-{min(high, 180)}°" for low, high in YAW_BINS]


# ---------------------------------------------------------------------------------------------------- metrics
class Metric(NamedTuple):
    words: str
    values: Callable  # one person's result -> its values; None where the clip does not show it
    percent: bool = False  # a rate, shown in per cent


def one(key):
    return lambda p: [p.get(key)]


def per_frame(key, low=0, high=181, seen=(True, False)):
    """A per-frame value where the head is turned by low to high degrees; seen: was the nearest view given"""
    return lambda p: [value for value, yaw, given in zip(p[key] or (), p["yaw"], p["seen"])
                      if yaw is not None and low <= abs(yaw) < high and given in seen]


def column(name, metric):
    return name + " %" if metric.percent else name


# ------------------------------------------------------------------------------------------------- statistics
class Estimate(NamedTuple):
    """A mean and its 95 % interval, which is infinite for a single value: nothing is known of others."""
    mean: float
    low: float
    high: float


def mean(values):
    """Of those that are not None; None of none."""
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else None


def by_case(results, metric):
    """{case: a Metric's mean over its results, people and frames}, without cases that do not show it."""
    values = {}
    for result in results:
        for person in result["people"]:
            values.setdefault(result["case"], []).extend(metric.values(person))
    means = {case: mean(values[case]) for case in sorted(values)}  # any order of results, one interval
    return {case: value for case, value in means.items() if value is not None}


def interval(values, bounds=None, draws=2000):
    """The Estimate of a list's mean, by bootstrap; None for an empty list. For rates, and differences of
    rates, bounds are the least and the most: where all n are alike, they get 3/n (the rule of three)."""
    if not values:
        return None
    if len(values) == 1:
        return Estimate(float(values[0]), -math.inf, math.inf)
    if bounds and len(set(values)) == 1:
        value, spread = values[0], 3 / len(values)
        return Estimate(value, max(bounds[0], value - spread), min(bounds[1], value + spread))
    values = torch.tensor(values, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    means = values[torch.randint(len(values), (draws, len(values)), generator=g)].mean(dim=1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975]).double()).tolist()
    return Estimate(float(values.mean()), low, high)


def estimate(results, metric):
    """The Estimate of a Metric over the cases of these results."""
    return interval(list(by_case(results, metric).values()), (0, 1) if metric.percent else None)


def by_yaw(results, key, percent=False):
    """A per-frame value of these results in each of YAW_BINS: Estimates over cases."""
    return [estimate(results, Metric("", per_frame(key, low, high), percent)) for low, high in YAW_BINS]


# ----------------------------------------------------------------------------------------------------- tables
def as_text(found, percent=False, signed=False, with_interval=True):
    """An Estimate as text, "20.31 [19.86, 20.72]", with the digits that its interval deserves; "20.31" where
    that is infinite."""
    if found is None:
        return "-"
    found, digits = list(filter(math.isfinite, found)), 2
    if percent:
        found, digits = [100 * v for v in found], 0
    elif 0 < max(map(abs, found)) < 0.05:
        digits = 4
    average, *ends = (f"{round(v, digits) + 0.0:.{digits}f}" for v in found)  # + 0.0: no -0
    if signed and not average.startswith("-"):
        average = "+" + average
    return f"{average} [{', '.join(ends)}]" if with_interval and ends else average


def table(corner, groups, metrics, with_interval=True):
    """A header, and a line of cells for each group that is not empty. groups: {label: results}; metrics:
    {name: Metric}"""
    lines = [[corner, *(column(name, metric) for name, metric in metrics.items())]]
    for label, group in groups.items():
        if group:
            cells = [as_text(estimate(group, metric), metric.percent, with_interval=with_interval)
                     for metric in metrics.values()]
            lines.append([label, *cells])
    return lines


def in_columns(lines):
    """Lines of cells as text in columns."""
    first, *others = [max(map(len, column)) for column in zip(*lines)]
    text = ["  ".join([name.ljust(first), *map(str.rjust, cells, others)]) for name, *cells in lines]
    return "\n".join(text)


# ---------------------------------------------------------------------------------------------------- results
def read_results(path):
    """The lines that earlier calls wrote. One that was cut off or changed since does not fit its checksum and
    is left out: it is measured again."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a file: choose another --out")
    return [line for line in read_lines(path) if line.pop("checksum", None) == line_checksum(line)]


def line_checksum(line):
    return hashlib.sha256(json.dumps(line).encode()).hexdigest()[:12]


class Results(dict):
    """{key: result} of a file of JSON lines, where a key is what a result says under some names. A restart
    goes on from those that are there; ranks share the file."""

    def __init__(self, path, names):
        super().__init__()
        self.path, self.names = path, names
        self.read()

    def read(self):
        for line in read_results(self.path):
            self.put(line)

    def put(self, line):
        key = tuple(line.get(name) for name in self.names)
        self.pop(key, None)  # the order is that of the file's last lines
        self[key] = line

    def add(self, line):
        """Add a result, below whatever is in the file -> it."""
        self.put(line)
        text = json.dumps(line | {"checksum": line_checksum(line)}) + "\n"
        with naming(self.path), open(self.path, "ab+", buffering=0) as file:
            take_lock(file)  # other processes append too: only one may look at the end and write
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            if file.read() not in (b"", b"\n"):  # a line that a kill cut off
                text = "\n" + text
            file.write(text.encode())
        return line


def hold(folder, world):
    """The lock of an --out folder, which rank 0 holds for all."""
    return lock(folder) if world.rank == 0 else contextlib.nullcontext()


# ---------------------------------------------------------------------------------------------------- figures
def strip(pictures, kind="png"):
    """uint8 pictures [H, W, 3] of one height beside each other, a file of that kind in base64."""
    file = io.BytesIO()
    Image.fromarray(np.concatenate(list(pictures), axis=1)).save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


# ------------------------------------------------------------------------------------------------------- page
def case_html(title, pictures, lines=(), kind="png"):
    """One case. pictures: (a file of that kind in base64, its caption) each; lines: text below them"""
    figures = [f'<figure><img src="data:image/{kind};base64,{html.escape(picture)}">'
               f"<figcaption>{html.escape(caption)}</figcaption></figure>" for picture, caption in pictures]
    lines = [f"<p>{html.escape(line)}</p>" for line in lines]
    return f"<h3>{html.escape(title)}</h3><div>{''.join(figures + lines)}</div>"


def write_page(path, name, heading, lines, metrics, plots, cases=()):
    """report.html: the table `lines` turned by a quarter, what its metrics mean, plots, and the cases, which
    are HTML already, as plots are."""
    rows = ["".join(f"<td>{html.escape(cell)}</td>" for cell in cells) for cells in zip(*lines)]
    legend = [f"<li><b>{html.escape(key)}</b>: {html.escape(metric.words)}</li>"
              for key, metric in metrics.items()]
    page = f"""<!doctype html><meta charset="utf-8"><title>HarmoView: {name}</title><style>
body {{ font: 14px sans-serif; margin: 2em; max-width: 1320px }} svg {{ font: 11px sans-serif; margin: 6px }}
table {{ border-collapse: collapse; font-size: 12px }} td {{ padding: 3px 9px; text-align: right }}
tr:first-child {{ font-weight: bold }} tr:nth-child(even) {{ background: #f5f5f5 }}
td:first-child {{ text-align: left }} li {{ margin: 2px }}
img[src^="data:image/png"] {{ image-rendering: pixelated }} img {{ height: 72px; display: block }}
h3 {{ margin: 22px 0 4px }} div p {{ margin: 2px 0; max-width: 1000px }}
figure {{ display: inline-block; margin: 0 14px 8px 0; vertical-align: top }}
figcaption {{ font-size: 11px; color: #555 }}</style>
<h1>HarmoView on the {name}</h1><p>{html.escape(heading)}. Means over cases with 95 % bootstrap intervals.</p>
<table><tr>{'</tr><tr>'.join(rows)}</tr></table><ul>{''.join(legend)}</ul>
<div>{''.join(plots)}</div>{"<h2>All cases, the worst first</h2>" * bool(cases)}
{''.join(cases)}"""
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
