"""Make videos from a caption and reference pictures.

  python sample.py          people the toy never saw, from the newest checkpoint
  python sample.py --refs a_front.png a_left.png --refs b_front.png --prompt "a close-up of two people, ..."

One --refs per person, in the caption's order. A file's view is the word front, left, right or back in its
name, or view=path. Writes OUT.mp4 and OUT.png, a contact sheet with the references on the left and the frames
on the right.
"""
import argparse
import re
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

import data
from model import autocast, find_checkpoint, load_checkpoint
from rope import VIEWS, UserError

SOLVERS = ("euler",)
STEPS, SHIFT, GUIDE_REFS = 8, 8.0, 1.5  # defaults for the toy, chosen on its benchmark (LOG.md)


# --------------------------------------------------------------------------------------- solvers and guidance
def solve(velocity, x, steps, shift, solver="euler"):
    """Integrate dx/dsigma = velocity from noise x at sigma 1 to x0 at sigma 0.

    velocity  function (x, t) -> noise - x0, t a scalar tensor in 0..1000
    shift     sigma -> shift * sigma / (1 + (shift - 1) * sigma): more than 1 spends more steps at high noise
    Raises UserError for an unknown solver or less than one step.
    """
    if solver not in SOLVERS:
        raise UserError(f"unknown solver {solver!r}; expected one of {', '.join(SOLVERS)}")
    if steps < 1:
        raise UserError(f"{steps} steps; expected at least 1")
    sigma = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    sigma = (shift * sigma / (1 + (shift - 1) * sigma)).to(x.device)
    for now, then in zip(sigma, sigma[1:]):
        x = x + (then - now) * velocity(x, (1000 * now).float())
    return x


def guided(model, text, no_text, refs, vit, guide_text=1.0, guide_refs=1.0):
    """velocity(x, t) with two guidance scales: from nothing to the caption, and from the caption to
    caption and references.

    v = v(-, -) + guide_text * (v(text, -) - v(-, -)) + guide_refs * (v(text, refs) - v(text, -)), where "no
    references" is every slot as proxies and "no caption" the rows no_text. Written as one weighted sum, terms
    of weight 0 cost nothing.
    """
    nobody, unseen = [{} for _ in refs], [None for _ in refs]
    terms = [(guide_refs, text, refs, vit), (guide_text - guide_refs, text, nobody, unseen),
             (1 - guide_text, no_text, nobody, unseen)]
    terms = [term for term in terms if term[0]]

    def velocity(x, t):
        return sum(weight * model(x, t.expand(len(x)), rows.expand(len(x), -1, -1), r, v)
                   for weight, rows, r, v in terms)
    return velocity


@torch.no_grad()
def generate(model, encoders, captions, people, frames, size, seeds, steps=STEPS, shift=SHIFT, solver="euler",
             guide_text=1.0, guide_refs=1.0):
    """Videos [B, 3, frames, size, size] in -1..1.

    captions  B strings
    people    one dict per identity, {view: reference pictures [B, 3, size, size] in -1..1}
    seeds     B ints: a video's noise depends on its own seed alone
    """
    codec, device = encoders.codec, next(model.parameters()).device
    refs = [{view: codec.encode(image[:, :, None])[:, :, 0].to(device) for view, image in views.items()}
            for views in people]
    vit = [encoders.features(views["front"]).to(device) if "front" in views else None for views in people]
    text, no_text = encoders.text(captions).to(device), encoders.text([""]).to(device)
    shape = (model.config.in_dim, frames, size // codec.stride, size // codec.stride)
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed))
                         for seed in seeds]).to(device)
    velocity = guided(model, text, no_text, refs, vit, guide_text, guide_refs)
    with autocast(device):
        latent = solve(velocity, noise, steps, shift, solver)
    return codec.decode(latent.cpu()).clamp(-1, 1)


# ---------------------------------------------------------------------------------------- reading and writing
def view_of(argument):
    """"left=path" or a path with one view's word in its name -> (view, path)."""
    name, found, path = argument.partition("=")
    if found and name in VIEWS:
        return name, path
    words = [word for word in re.findall("[a-z]+", Path(argument).stem.lower()) if word in VIEWS]
    if len(words) != 1:
        raise UserError(f"{argument}: which view is it? Its name says {' and '.join(words) or 'none'}; "
                        f"name the file or write view=path with one of {', '.join(VIEWS)}, "
                        f"for example front={argument}")
    return words[0], argument


def read_picture(path, size):
    """A picture file -> [3, size, size] in -1..1: EXIF orientation, alpha on white, Lanczos fit,
    white padding."""
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGBA")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; --refs expects picture files") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable picture ({error}); "
                        "--refs expects PNG, JPEG or WebP files") from None
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image = ImageOps.pad(image, (size, size), Image.Resampling.LANCZOS, color="white")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 3)
    return data.from_bytes(pixels).permute(2, 0, 1)


def read_people(arguments, size):
    """--refs values, one list of files per person -> [{view: [1, 3, size, size]}]."""
    people = []
    for files in arguments:
        views = {}
        for view, path in map(view_of, files):
            if view in views:
                raise UserError(f"{path}: a second {view} view of the same person; "
                                "give one picture a view, and one --refs a person")
            views[view] = read_picture(path, size)[None]
        people.append(views)
    return people


def wrap(text, font, width):
    """text with line breaks where a line would be wider than `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def contact_sheet(rows, tile=112):
    """A PIL image. rows: dicts of people (list of {view: [3, S, S]}), video [3, F, S, S], prompt,
    and perhaps truth, a second video, and a note to go behind the prompt.

    Each person is a block of 2 x 2 views on the left, a view that was not given an empty square;
    frames are on the right, the prompt is below.
    """
    font, gap, line = ImageFont.load_default(13), 6, 17
    blocks = max(len(row["people"]) for row in rows)
    left = blocks * (tile + gap) + gap
    width = left + max(row["video"].shape[1] for row in rows) * tile + gap
    prompts = [wrap(row["prompt"] + row.get("note", ""), font, width - 2 * gap) for row in rows]
    heights = [tile * (1 + ("truth" in row)) + line * (text.count("\n") + 1) + 2 * gap
               for row, text in zip(rows, prompts)]
    sheet = Image.new("RGB", (width, sum(heights) + gap), "white")
    draw, y = ImageDraw.Draw(sheet), gap
    for row, text, height in zip(rows, prompts, heights):
        for k, views in enumerate(row["people"]):
            for v, view in enumerate(VIEWS):
                at = (gap + k * (tile + gap) + v % 2 * tile // 2, y + v // 2 * tile // 2)
                if view in views:
                    sheet.paste(data.to_image(views[view], tile // 2), at)
                draw.rectangle((*at, at[0] + tile // 2 - 1, at[1] + tile // 2 - 1), outline="#cccccc")
        for i, video in enumerate((row["video"], row["truth"]) if "truth" in row else (row["video"],)):
            for f in range(video.shape[1]):
                sheet.paste(data.to_image(video[:, f], tile - 1), (left + f * tile, y + i * tile))
        if "truth" in row:
            draw.text((gap, y + tile + tile // 2 - 8), "ground truth", fill="#666666", font=font)
        draw.multiline_text((gap, y + tile * (1 + ("truth" in row))), text, fill="black", font=font)
        y += height
    return sheet


# -------------------------------------------------------------------------------------------------------- CLI
def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_argument_group("what to show")
    what.add_argument("--refs", nargs="+", action="append", metavar="PICTURE",
                      help="one person's views; give it once per person")
    what.add_argument("--prompt", help="the caption (without --refs: of people the toy held out)")
    what.add_argument("--views", nargs="+", choices=VIEWS, default=VIEWS,
                      help="without --refs: the views that are given")
    what.add_argument("--swap", action="store_true",
                      help="again below with the two people's references exchanged, same noise")
    what.add_argument("--ckpt", default="out/toy",
                      help="checkpoint folder, or a run's folder: its newest one (default out/toy)")
    what.add_argument("--out", default="out/sample",
                      help="where to write, without suffix (default out/sample)")
    how = p.add_argument_group("how")
    how.add_argument("--frames", type=int, help="frames (default: what the checkpoint was trained on)")
    how.add_argument("--size", type=int, help="pixels a side (default: what the checkpoint was trained on)")
    how.add_argument("--fps", type=int, default=4, help="frames per second of the MP4")
    how.add_argument("--steps", type=int, default=STEPS, help="solver steps")
    how.add_argument("--shift", type=float, default=SHIFT, help="timestep shift")
    how.add_argument("--solver", choices=SOLVERS, default="euler")
    how.add_argument("--guide-text", type=float, default=1.0, help="guidance towards the caption; 1 is none")
    how.add_argument("--guide-refs", type=float, default=GUIDE_REFS,
                     help="guidance towards the references; 1 is none")
    how.add_argument("--seed", type=int, default=0)
    return p.parse_args(argv)


def load(ckpt):
    """--ckpt -> model, its encoders, its checkpoint.json; says which checkpoint it took."""
    folder = find_checkpoint(ckpt)
    if folder is None:
        raise UserError(f"no checkpoint at {ckpt}: make one with `python train.py --stage all`, "
                        "about ten minutes on a laptop")
    model, meta = load_checkpoint(folder)
    print(f"checkpoint {folder} (stage {meta['stage']} {meta['name']}, step {meta['step']})")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval().to(device), data.ToyEncoders(folder, meta["world"]["size"]), meta


def held_out(prompt, views, frames, size):
    """Rows of people that training never saw: [{people, prompt, truth}], four benchmark cases,
    or one with the prompt given."""
    pictures = data.benchmark_references(size)

    def given(who):
        return [{v: pictures[i:i + 1, VIEWS.index(v)] for v in views} for i in who]
    if prompt is not None:
        return [{"people": given(range(2 if "two people" in prompt else 1)), "prompt": prompt}]
    rows = []
    identities = data.draw_identities(data.BENCHMARK_IDENTITIES, data.BENCHMARK_SEED)
    cases = data.benchmark_cases()
    for clip, who in (cases[i] for i in (0, 1, 60, 61)):
        truth, _ = data.render_clips([clip], [data.pick(identities, i) for i in who], frames, size)
        rows.append({"people": given(who), "prompt": data.caption(clip), "truth": truth[0]})
    return rows


def main(argv=None):
    args = arguments(argv)
    if args.prompt is not None and not args.prompt.strip():
        raise UserError("--prompt is empty: say what happens, "
                        "for example \"a close-up of one person in a red shirt nods ...\"")
    if args.refs and args.prompt is None:
        raise UserError("--refs needs --prompt: say what the people do")
    if args.fps < 1:
        raise UserError(f"--fps {args.fps}: expected at least 1 frame a second")
    out = Path(args.out)
    data.probe_writable(out.parent)
    model, encoders, meta = load(args.ckpt)
    world, held = meta["world"], model.config.max_identities
    frames = world["frames"] if args.frames is None else args.frames
    size = world["size"] if args.size is None else args.size
    if (frames, size) != (world["frames"], world["size"]):
        raise UserError(f"{frames} frames of {size}x{size}: "
                        f"this checkpoint makes {world['frames']} frames of {world['size']}x{world['size']}")
    if args.refs and len(args.refs) > held:
        raise UserError(f"{len(args.refs)} people (--refs given {len(args.refs)} times): "
                        f"this checkpoint holds at most {held}")
    if args.refs:
        rows = [{"people": read_people(args.refs, size), "prompt": args.prompt}]
    else:
        rows = held_out(args.prompt, args.views, frames, size)
    if args.swap:
        if not any(len(row["people"]) == 2 for row in rows):
            raise UserError("--swap exchanges two people: give --refs twice, or a prompt of two people")
        rows = [{"people": people, "prompt": row["prompt"], "note": note}
                for row in rows if len(row["people"]) == 2
                for people, note in ((row["people"], ""), (row["people"][::-1], "  (references exchanged)"))]
    start = time.perf_counter()
    for row in tqdm(rows, desc="sampling", unit=" videos", disable=None):
        row["video"] = generate(model, encoders, [row["prompt"]], row["people"], frames, size, [args.seed],
                                args.steps, args.shift, args.solver, args.guide_text, args.guide_refs)[0]
        row["people"] = [{view: picture[0] for view, picture in views.items()} for views in row["people"]]
    names = ([out.with_suffix(".mp4")] if len(rows) == 1 else
             [out.with_name(f"{out.name}-{i}.mp4") for i in range(1, len(rows) + 1)])
    for name, row in zip(names, rows):
        data.write_video(name, row["video"], args.fps)
    contact_sheet(rows).save(out.with_suffix(".png"))
    print(f"{', '.join(map(str, names))} and {out.with_suffix('.png')} "
          f"in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"sample.py: {error}")
