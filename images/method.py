"""The method in one picture: python images/method.py [--out FILE] writes it as SVG.

Every token stands where rope.py puts it: its time t chooses the column, w and h the place in the column.
tests/test_figure.py holds images/method.svg to what this file draws. Lengths are pixels.
"""
import random
import sys
from collections import Counter
from html import escape
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from checkpoint import Parser, atomic_file, run_script  # noqa: E402
from rope import VIEWS, reference_positions, video_positions  # noqa: E402

T, SIDE = 6, 5  # the example: a video of T times, each of SIDE x SIDE tokens; references have the same size
JUMP, PROXY_TOKENS = 16, 4
CONTEXT_ROWS, CAPTION_ROWS, MFI_ROWS = 512, 120, 130  # MFI: 2 levels of DINOv2-L at 112 pixels, 65 rows each

WIDTH, HEIGHT, LEFT = 900, 724, 32
CELL, COLUMN, BREAK = 7, 39, 60  # one token, one time, all the times that a gap leaves out
CONTEXT_X, CONTEXT_WIDTH, CONTEXT_HEIGHT = 766, 110, 88
# after Okabe and Ito: they differ for colour-blind readers too
VIDEO, PERSON, PROXY = "#0072b2", ("#d57800", "#00916a"), "#a0307a"
INK, GREY, PALE = "#222222", "#5f6368", "#eef0f2"

EXAMPLES = {
    "One person, all four views given": [VIEWS],
    "One person, only the front given": [("front",)],
    "Two people: all views of the first, front and left of the second": [VIEWS, ("front", "left")],
}
NOTES = [  # beside each of them
    [f"A given view: {SIDE}×{SIDE} tokens of its", "clean latent."],
    [f"A missing view: {PROXY_TOKENS} learnable proxy", "tokens, all at its slot’s centre.",
     "No other token moves."],
    [],
]
HEADER_NOTE = "A small square is a token; where it stands is its rotary position: time t, row h, column w."
MFI_NOTE = ["MFI: ViT features of the", "front view, in rows that", "Wan itself leaves zero."]
APPEND_NOTE = ["“append” (Phantom): the views are", "further frames of the video, without a gap."]
RD_NOTE = ["“rd” (Mv2ID): all views share", "one time; each stands a whole", "frame further down and right."]


class Slot(NamedTuple):
    person: int
    view: str
    is_given: bool
    positions: list  # one [t, h, w] a token; all have the same t

    @property
    def time(self):
        return self.positions[0][0]


def slots_of(layout, present):
    """The references' positions, cut into slots: rope.py goes person by person, slot by slot."""
    positions = reference_positions(layout, present, T, SIDE, SIDE, (SIDE, SIDE), PROXY_TOKENS, JUMP)
    positions, slots = positions.tolist(), []
    for person, views in enumerate(present):
        for view in VIEWS:
            tokens = SIDE * SIDE if view in views else PROXY_TOKENS
            slots.append(Slot(person, view, view in views, positions[:tokens]))
            positions = positions[tokens:]
    return slots


def time_axis(times):
    """{t: left edge of its column}, and {t before a gap: (first, last) of the empty times}."""
    columns, gaps, x, last = {}, {}, LEFT, 0
    for t in sorted(set(times)):
        if t > last + 1:
            gaps[last] = last + 1, t - 1
            x += BREAK
        columns[t], last = x, t
        x += COLUMN
    return columns, gaps


# ----------------------------------------------------------------------------------------------- SVG elements
def element(name, **attributes):
    words = [f'{key.replace("_", "-")}="{value}"' for key, value in attributes.items()]
    return f"<{name} {' '.join(words)}/>"


def rect(x, y, width, height, fill, **attributes):
    return element("rect", x=x, y=y, width=width, height=height, fill=fill, **attributes)


def line(x1, y1, x2, y2, colour=GREY, **attributes):
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke=colour, stroke_width=1.5, **attributes)


def text(x, y, words, size=13, fill=INK, anchor="start", weight="normal"):
    return (f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" text-anchor="{anchor}" '
            f'font-weight="{weight}">{escape(words)}</text>')


def paragraph(x, y, lines, anchor="start"):
    return [text(x, y + 17 * number, words, anchor=anchor) for number, words in enumerate(lines)]


def arrow(x1, y, x2, colour):
    """A horizontal line with its point at x2."""
    back = 7 if x2 < x1 else -7
    return [line(x1, y, x2 + back / 2, y, colour),
            element("path", d=f"M{x2} {y} l{back} -4 v8 z", fill=colour)]


def squares(positions, columns, y, cell, colour, is_noise=False):
    """One square a token; y is where h = 0. Noise is squares of uneven strength."""
    noise, drawing = random.Random(0), []
    for t, h, w in positions:
        strength = {"opacity": round(noise.uniform(0.3, 1), 2)} if is_noise else {}
        drawing.append(rect(columns[t] + w * cell, y + h * cell, cell - 1, cell - 1, colour, **strength))
    return drawing


def head(x, y, view, colour):
    """A head as the camera sees it."""
    side = {"left": -1, "right": 1}.get(view, 0)  # of the picture, to which it looks
    eyes = {"front": (-4, 4), "left": (-5,), "right": (5,), "back": ()}[view]
    face = "#ffffff" if eyes else colour
    drawing = [element("circle", cx=x, cy=y, r=11, fill=face, stroke=colour, stroke_width=2)]
    if side:
        nose = f"M{x + side * 10} {y - 6} l{side * 7} 8 l{-side * 7} 3 z"
        drawing.append(element("path", d=nose, fill=colour))
    for eye in eyes:
        drawing.append(element("circle", cx=x + eye, cy=y - 2, r=1.8, fill=colour))
    if eyes:
        drawing.append(line(x + side * 5 - 3, y + 5, x + side * 5 + 3, y + 5, colour))
    return drawing


# --------------------------------------------------------------------------------------- parts of the picture
def draw_header(columns, slots):
    middle, right = columns[0] + T * COLUMN / 2 - 2, CONTEXT_X + CONTEXT_WIDTH
    drawing = [text(LEFT - 8, 32, "Self-attention: one sequence, every token sees every other", 16,
                    weight="bold"),
               text(LEFT - 8, 52, HEADER_NOTE, fill=GREY),
               text(right, 32, "Cross-attention", 16, anchor="end", weight="bold"),
               text(right, 52, f"text context, {CONTEXT_ROWS} rows", fill=GREY, anchor="end"),
               text(middle, 104, "Video", 15, VIDEO, "middle", "bold"),
               text(middle, 124, f"T = {T} latent frames, being denoised", anchor="middle")]
    for slot in slots:
        x, colour = columns[slot.time], PERSON[slot.person]
        drawing += head(x + COLUMN / 2 - 2, 104, slot.view, colour)
        drawing.append(text(x + COLUMN / 2 - 2, 131, slot.view, anchor="middle"))
        if slot.view == VIEWS[0]:
            drawing.append(text(x, 84, f"Person {slot.person + 1}", 15, colour, weight="bold"))
    return drawing


def draw_sequence(columns, gaps, slots, y):
    """The tokens of one sequence on their lane; y is where h = 0."""
    end = columns[slots[-1].time] + COLUMN + 6
    drawing = [rect(LEFT - 10, y - 10, end - LEFT + 10, SIDE * CELL + 20, PALE, rx=8)]
    for before in gaps:
        if before < slots[-1].time:
            x, middle = columns[before] + COLUMN, y + SIDE * CELL / 2
            drawing += [line(x + 4, middle, x + BREAK - 8, middle, stroke_dasharray="2 4"),
                        text(x + BREAK / 2 - 2, middle - 6, "gap", 13, GREY, "middle")]
    drawing += squares(video_positions(T, SIDE, SIDE).tolist(), columns, y, CELL, VIDEO, is_noise=True)
    for slot in slots:
        if slot.is_given:
            drawing += squares(slot.positions, columns, y, CELL, PERSON[slot.person])
            continue
        side = SIDE * CELL - 1
        drawing.append(rect(columns[slot.time], y, side, side, "none", stroke=PERSON[slot.person],
                            stroke_dasharray="3 3"))
        for (t, h, w), tokens in Counter(map(tuple, slot.positions)).items():
            centre_x, centre_y = columns[t] + w * CELL + CELL / 2 - 0.5, y + h * CELL + CELL / 2 - 0.5
            drawing += [element("circle", cx=centre_x, cy=centre_y, r=9, fill=PROXY),
                        text(centre_x, centre_y + 4.5, str(tokens), 13, "#ffffff", "middle", "bold")]
    return drawing


def draw_context(people, y, end):
    """The text context, its rows to scale, and the arrow to the tokens that read it."""
    parts = [("caption", CAPTION_ROWS, "#cfd4da"),
             ("zeros", CONTEXT_ROWS - CAPTION_ROWS - people * MFI_ROWS, "#ffffff")]
    for person in range(people):
        parts.append((f"MFI, person {person + 1}", MFI_ROWS, PERSON[person]))
    drawing, top, middle = [], y, CONTEXT_X + CONTEXT_WIDTH / 2
    for words, rows, colour in parts:
        height = rows * CONTEXT_HEIGHT / CONTEXT_ROWS
        ink, weight = ("#ffffff", "bold") if colour in PERSON else (INK, "normal")
        drawing += [rect(CONTEXT_X, round(top, 2), CONTEXT_WIDTH, round(height, 2), colour),
                    text(middle, round(top + height / 2 + 4.5, 1), words, 13, ink, "middle", weight)]
        top += height
    drawing.append(rect(CONTEXT_X, y, CONTEXT_WIDTH, CONTEXT_HEIGHT, "none", stroke=GREY))
    if CONTEXT_X - end > 200:  # else the arrow is too short for words
        drawing.append(text(end + 16, y + CONTEXT_HEIGHT / 2 - 7, "every token reads the context", 13, GREY))
    return drawing + arrow(CONTEXT_X - 4, y + CONTEXT_HEIGHT / 2, end, GREY)


def draw_axis(columns, gaps, slots, y):
    """The times, what the gaps leave out, and the jumps."""
    drawing = [text(columns[0] - 2, y + 35, "time t", 13, GREY)]
    for t, x in columns.items():
        middle = x + COLUMN / 2 - 2
        drawing += [line(x - 2, y, x + COLUMN - 2, y), line(middle, y, middle, y + 5),
                    text(middle, y + 19, str(t), anchor="middle")]
        if t >= T - 1:
            drawing.append(text(middle, y + 35, f"T+{t - T}" if t >= T else "T−1", 12, GREY, "middle"))
    for before, (first, last) in gaps.items():
        x = columns[before] + COLUMN - 2
        drawing += [line(x, y, x + BREAK, y, stroke_dasharray="2 4"),
                    text(x + BREAK / 2, y + 19, f"{first}–{last}", 13, GREY, "middle"),
                    text(x + BREAK / 2, y + 35, "empty", 12, GREY, "middle")]
    x, y = columns[T - 1] + COLUMN - 2, y + 47  # x: where the video ends, which is the time T
    for slot in slots:
        if slot.view == VIEWS[0]:
            end = columns[slot.time] - 2
            drawing += [line(x, y - 5, x, y + 5, INK), line(end, y - 5, end, y + 5, INK),
                        *arrow(x, y, end, INK),
                        text((x + end) / 2, y + 18, f"jump {JUMP}", 13, INK, "middle", "bold")]
            x = end
    return drawing


def draw_other_layout(layout, x, y, words_x, words):
    """One person's four views under another layout, small; x and y are where t, h and w are 0."""
    slots = slots_of(layout, [VIEWS])
    columns = {t: x + 17 * t for t in range(slots[-1].time + 1)}
    drawing = squares(video_positions(T, SIDE, SIDE).tolist(), columns, y, 3, VIDEO, is_noise=True)
    for slot in slots:
        drawing += squares(slot.positions, columns, y, 3, PERSON[0])
    return drawing + paragraph(words_x, y + 38, words)


def figure():
    """The whole picture, as the text of an SVG file."""
    sequences = [slots_of("jump", present) for present in EXAMPLES.values()]
    everybody, right = sequences[-1], CONTEXT_X + CONTEXT_WIDTH
    columns, gaps = time_axis([*range(T), *(slot.time for slot in everybody)])
    drawing = [rect(0, 0, WIDTH, HEIGHT, "#ffffff", rx=12), *draw_header(columns, everybody)]
    y = 154
    for title, slots, note in zip(EXAMPLES, sequences, NOTES):
        end = columns[slots[-1].time] + COLUMN + 10
        drawing += [text(LEFT - 8, y + 8, title, 14, weight="bold"),
                    *draw_sequence(columns, gaps, slots, y + 30),
                    *draw_context(1 + slots[-1].person, y - 6, end),
                    *paragraph(end + 16, y + 57, note)]
        y += 106
    drawing += [*draw_axis(columns, gaps, everybody, y + 4), *paragraph(right, y + 9, MFI_NOTE, "end")]
    y += 96
    drawing += [line(LEFT - 8, y, right, y, "#d5d8dc"),
                text(LEFT - 8, y + 28, "Other layouts of the same four views, to compare", 14, weight="bold"),
                *draw_other_layout("append", LEFT, y + 46, LEFT - 8, APPEND_NOTE),
                *draw_other_layout("rd", 452, y + 46, 662, RD_NOTE)]
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
                      f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="Helvetica, Arial, sans-serif">',
                      *drawing, "</svg>", ""])


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "images" / "method.svg", help="SVG file to write")
    out = parser.parse_args().out
    with atomic_file(out) as path:
        path.write_bytes(figure().encode())


if __name__ == "__main__":
    run_script(main)
