"""README's picture of the method: it is what images/method.py draws, and that draws rope.py's positions."""
import importlib.util
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import pytest

import rope

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("method", ROOT / "images" / "method.py")
method = importlib.util.module_from_spec(spec)
spec.loader.exec_module(method)


def elements(svg, kind):
    """The drawing's elements of one kind; numbers become floats, and the words of a text are its "words"."""
    found = []
    for node in ElementTree.fromstring(svg).iter(f"{{http://www.w3.org/2000/svg}}{kind}"):
        values = {"words": node.text}
        for key, value in node.attrib.items():
            try:
                values[key] = float(value)
            except ValueError:
                values[key] = value
        found.append(values)
    return found


def drawn_positions(svg):
    """A Counter of (t, h, w) for each lane, read back from squares, proxy discs and the ticks' numbers."""
    rects, texts = elements(svg, "rect"), elements(svg, "text")
    ticks = {}
    for label in texts:
        if label["words"].isdigit() and label["fill"] == method.INK:
            ticks[int(label["words"])] = label["x"]
    lanes = []
    for lane in rects:
        if lane.get("rx") == 8:
            lanes.append((lane["y"] + 10, Counter()))

    def add(centre_x, centre_y, tokens):
        half = method.SIDE // 2
        for top, positions in lanes:
            h = round((centre_y - top) / method.CELL - 0.45)
            for t, tick in ticks.items():
                w = half + round((centre_x - tick) / method.CELL)
                if 0 <= h < method.SIDE and 0 <= w < method.SIDE:
                    positions[t, h, w] += tokens

    for token in rects:
        if token["width"] == token["height"] == method.CELL - 1:
            add(token["x"] + token["width"] / 2, token["y"] + token["height"] / 2, 1)
    for disc in elements(svg, "circle"):
        if disc["fill"] == method.PROXY:
            inside = [label for label in texts if label["x"] == disc["cx"] and label["fill"] == "#ffffff"
                      and abs(label["y"] - disc["cy"]) < disc["r"]]
            add(disc["cx"], disc["cy"], int(inside[0]["words"]))
    return [positions for _, positions in lanes]


def expected_positions(jump):
    expected = []
    for present in method.EXAMPLES.values():
        side = method.SIDE
        positions = rope.video_positions(method.T, side, side).tolist()
        positions += rope.reference_positions("jump", present, method.T, side, side, (side, side),
                                              method.PROXY_TOKENS, jump).tolist()
        expected.append(Counter(map(tuple, positions)))
    return expected


def test_the_committed_picture_is_what_the_script_draws(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["method.py", "--out", str(tmp_path / "method.svg")])
    method.main()
    drawn = (tmp_path / "method.svg").read_bytes()
    assert drawn == (ROOT / "images" / "method.svg").read_bytes(), "run python images/method.py"
    assert drawn == method.figure().encode()


def test_the_examples_are_one_person_a_missing_view_and_two_people():
    assert list(method.EXAMPLES.values()) == [[rope.VIEWS], [("front",)], [rope.VIEWS, ("front", "left")]]
    assert [len(list(lane.elements())) for lane in drawn_positions(method.figure())] == [250, 187, 308]


@pytest.mark.parametrize("jump", [16, 23])
def test_every_token_is_drawn_at_its_rope_position(jump, monkeypatch):
    monkeypatch.setattr(method, "JUMP", jump)
    svg = method.figure()
    assert drawn_positions(svg) == expected_positions(jump)
    words = [label["words"] for label in elements(svg, "text")]
    first, second = method.T + jump, method.T + 2 * jump
    assert words.count(f"jump {jump}") == 2 and f"T+{jump}" in words and f"T+{2 * jump}" in words
    assert f"{method.T}–{first - 1}" in words and f"{first + len(rope.VIEWS)}–{second - 1}" in words


def test_another_rule_in_rope_py_is_another_picture(monkeypatch):
    before = drawn_positions(method.figure())

    def spread(k, v, r, T, H, W, jump):
        return T + jump * (k + 1) + 2 * v, 0, 0
    monkeypatch.setitem(rope.LAYOUTS, "jump", spread)
    after = drawn_positions(method.figure())
    assert after != before and after == expected_positions(method.JUMP)


@pytest.mark.parametrize("layout", ["append", "rd"])
def test_the_small_layouts_are_rope_positions_too(layout, monkeypatch):
    before = method.figure()
    original = rope.LAYOUTS[layout]

    def later(k, v, r, T, H, W, jump):
        t, h, w = original(k, v, r, T, H, W, jump)
        return t + 1, h, w
    monkeypatch.setitem(rope.LAYOUTS, layout, later)
    moved = 0
    for old, new in zip(elements(before, "rect"), elements(method.figure(), "rect"), strict=True):
        moved += old != new
    assert moved == len(rope.VIEWS) * method.SIDE**2


def test_the_picture_needs_no_style_and_is_readable_on_a_dark_page():
    svg = method.figure()
    for word in ("<style", "<script", "class=", "style=", "href"):
        assert word not in svg
    ground = elements(svg, "rect")[0]
    assert (ground["width"], ground["height"], ground["fill"]) == (method.WIDTH, method.HEIGHT, "#ffffff")
    assert all(12 <= label["font-size"] <= 16 for label in elements(svg, "text"))
