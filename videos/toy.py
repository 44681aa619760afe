"""The toy world: drawn heads with exact ground truth for any identity in any clip. It needs no download.

A Clip says in names what happens; render_clips makes videos of clips and identities, caption(clip) words.
Another identity in the same call shows somebody else; so eval.py measures identity without a face network.

  python toy.py --out DIR     writes sample clips (MP4), references (PNG) and captions to look at
"""
import colorsys
import functools
import json
import math
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F

from networks.encoders import UMT5, DINOv2, Tokenizer
from rope import VIEWS
from support.script import (ROOT, Parser, UserError, atomic_file, count, fingerprint, frame_rate, in_range,
                            lock, nonempty, probe_writable, progress, source_hash)
from videos.encode import encode
from videos.jobs import Job
from videos.manifest import Sample, read_manifest, sample_of
from videos.pictures import from_bytes, to_bytes, to_image, write_video

BENCHMARK_IDENTITIES = 52  # held out: training identities come from another seed
BENCHMARK_SEED, TRAIN_SEED, VALID_SEED = 52_000, 1, 77_000

# ---------------------------------------------------------------------------------------------- the toy world
# Every name below appears in captions word for word; u runs from 0 to 1 over the clip, angles in degrees.
MOTIONS = {  # name: u -> (yaw, pitch, roll); yaw > 0 looks to the picture's right edge, pitch > 0 looks up.
    # words of their own: a random umT5 shows word order only faintly ("turns from left to right": -0.4 dB)
    "sweeps rightwards": lambda u: (180 * u - 90, 0 * u, 0 * u),
    "sweeps leftwards": lambda u: (90 - 180 * u, 0 * u, 0 * u),
    "looks around": lambda u: (75 * (math.tau * u).sin(), 0 * u, 0 * u),
    "turns away": lambda u: (180 * u, 0 * u, 0 * u),
    "nods": lambda u: (0 * u, 25 * (math.tau * u).sin(), 0 * u),
    "tilts the head": lambda u: (0 * u, 0 * u, 25 * (math.tau * u).sin()),
}
SWEEPS = ("sweeps rightwards", "sweeps leftwards", "looks around", "turns away")  # these show sides or back
MOUTHS = {"the mouth closed": lambda u: 0 * u, "the mouth open": lambda u: 0 * u + 1,
          "the mouth opening": lambda u: u}
# head radius, start and end
ZOOMS = {"a close-up": (0.70, 0.70), "a medium shot": (0.58, 0.58), "a slow zoom in": (0.54, 0.72)}
LIGHTS = {  # direction towards the light (x right, y up, z to the viewer) and its colour
    "soft light": ((0.0, 0.4, 1.0), (1.0, 1.0, 1.0)),
    "light from the left": ((-1.0, 0.3, 0.5), (1.0, 1.0, 1.0)),
    "light from the right": ((1.0, 0.3, 0.5), (1.0, 1.0, 1.0)),
    "warm light": ((0.2, 0.8, 0.7), (1.0, 0.86, 0.66)),
}
SHIRTS = {"red": (0.80, 0.16, 0.18), "blue": (0.16, 0.32, 0.78), "green": (0.13, 0.55, 0.30),
          "yellow": (0.93, 0.78, 0.20), "white": (0.93, 0.93, 0.93), "black": (0.13, 0.13, 0.15)}
BACKGROUNDS = {  # colour at the bottom and at the top
    "a blue wall": ((0.42, 0.56, 0.78), (0.50, 0.66, 0.88)),
    "a green wall": ((0.46, 0.62, 0.46), (0.56, 0.74, 0.56)),
    "a pink wall": ((0.80, 0.60, 0.64), (0.92, 0.72, 0.76)),
    "a grey wall": ((0.55, 0.55, 0.57), (0.70, 0.70, 0.72)),
    "a dark room": ((0.20, 0.20, 0.26), (0.28, 0.28, 0.36)),
    "a sunset": ((0.96, 0.70, 0.42), (0.60, 0.42, 0.62)),
}
VIEW_YAW = {"front": 0.0, "left": -85.0, "right": 85.0, "back": 180.0}
PATCHES = ("left", "right", "back")  # each seen in the view of that name and never from the front
# words for looks: the colour wheel in equal parts from red on, and skins from dark to light
HUES = ("red", "orange", "yellow", "lime", "green", "mint",
        "cyan", "azure", "blue", "violet", "magenta", "rose")
SKINS = ("ebony", "brown", "tan", "fair", "pale")


@dataclass(frozen=True)
class Clip:
    """What happens in a clip, in the names above; one motion, mouth and shirt a person, from the left."""
    motions: tuple
    mouths: tuple
    shirts: tuple
    zoom: str
    light: str
    background: str


def draw_clip(rng, n_people, motions=tuple(MOTIONS)):
    """A random Clip with one or two people; rng is a random.Random."""
    def each(names):
        return tuple(rng.choice(list(names)) for _ in range(n_people))
    return Clip(each(motions), each(MOUTHS), each(SHIRTS), rng.choice(list(ZOOMS)),
                rng.choice(list(LIGHTS)), rng.choice(list(BACKGROUNDS)))


def draw_clips(n, n_people, seed, motions=tuple(MOTIONS)):
    """n random Clips with that many people; seed is a number or a word."""
    rng = random.Random(f"{seed}-{n_people}")
    return [draw_clip(rng, n_people, motions) for _ in range(n)]


def caption(clip, looks=None):
    """The clip in words; nothing that the renderer shows is left out but who the people are.
    looks: words for each person's looks, as describe gives them, in a caption that tells these too."""
    def person(k):
        look = f"with {looks[k]} " if looks else ""
        return f"{look}in a {clip.shirts[k]} shirt {clip.motions[k]} with {clip.mouths[k]}"
    people = f"one person {person(0)}"
    if len(clip.motions) == 2:
        people = f"two people, the first on the left {person(0)}, the second on the right {person(1)}"
    return f"{clip.zoom} of {people}, {clip.light}, {clip.background}"


def colour_name(rgb):
    """The nearest of HUES to a colour, three numbers in 0..1, with a word before it where it is dark."""
    hue, _, value = colorsys.rgb_to_hsv(*rgb)
    shade = "dark " if value < 0.4 else "dim " if value < 0.7 else ""
    return shade + HUES[round(len(HUES) * hue) % len(HUES)]


def describe(identities, i):
    """The looks of one of these identities in words: what ATTRIBUTES of eval.py measure, and the beard."""
    def colour(name):
        return colour_name(identities[name][i].tolist())
    tone = (float(identities["skin"][i].mean()) - 0.24) / (0.83 - 0.24)  # draw_identities: darkest, palest
    skin = SKINS[min(len(SKINS) - 1, max(0, int(len(SKINS) * tone)))]
    words = f"{skin} skin, {colour('hair')} hair, {colour('eyes')} eyes"
    if identities["beard"][i]:
        words += ", a beard"
    return words + "".join(f", {side} patch {colour(f'patch_{side}')}" for side in PATCHES)


def hsv(h, s, v):
    """Hue, saturation, value in 0..1, each [n] -> RGB [n, 3]."""
    k = (torch.tensor([5.0, 3.0, 1.0]) + 6 * h[:, None]) % 6
    return v[:, None] * (1 - s[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))


def draw_identities(n, seed):
    """n identities, a dict of tensors [n, ...]; lengths in head heights, angles in degrees."""
    g = torch.Generator().manual_seed(seed)

    def between(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=g)
    tone = between(0, 1, 1)
    hue = between(0, 1)
    return {
        "skin": torch.lerp(torch.tensor([0.36, 0.22, 0.15]), torch.tensor([0.98, 0.82, 0.70]), tone)
                + between(-0.04, 0.04, 3),
        "hair": hsv(between(0, 1), between(0.25, 0.9), between(0.15, 0.95)),
        "eyes": hsv(between(0, 1), between(0.6, 1), between(0.4, 0.9)),
        "lips": hsv(between(0.9, 1.05), between(0.5, 0.8), between(0.45, 0.85)),
        "patch_left": hsv(hue, between(0.8, 1), between(0.75, 1)),
        "patch_right": hsv(hue + between(0.2, 0.45), between(0.8, 1), between(0.75, 1)),
        "patch_back": hsv(hue + between(0.55, 0.8), between(0.8, 1), between(0.75, 1)),
        "patch_height": between(-12, 38, 3), "patch_size": between(15, 23, 3),
        "width": between(0.70, 0.84), "depth": between(0.80, 0.92),
        "fringe": between(22, 52),  # elevation of the hairline at the front, at the ears and at the nape
        "sideburn": between(-15, 30),
        "nape": between(-60, 0),
        "beard": between(0, 1) < 0.3, "nose": between(0.11, 0.17),
    }


def pick(identities, index):
    """The identities at an index, or at several, still as a dict of tensors."""
    index = torch.as_tensor(index).reshape(-1)
    return {name: tensor[index] for name, tensor in identities.items()}


def rotation(yaw, pitch, roll):
    """Head to world, [n, 3, 3] from degrees [n]: roll, then pitch, then yaw."""
    (cy, sy), (cp, sp), (cr, sr) = ((a.deg2rad().cos(), a.deg2rad().sin()) for a in (yaw, -pitch, roll))
    zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)

    def matrix(*rows):
        return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))
    return (matrix(cy, zero, sy, zero, one, zero, -sy, zero, cy)
            @ matrix(one, zero, zero, zero, cp, -sp, zero, sp, cp)
            @ matrix(cr, -sr, zero, sr, cr, zero, zero, zero, one))


def ellipsoid(o, d, centre, radii):
    """Depth z where rays o + z*d first meet an ellipsoid, -inf where they miss; all are (x, y, z)."""
    o = [(a - c) / r for a, c, r in zip(o, centre, radii)]
    d = [a / r for a, r in zip(d, radii)]
    a = sum(x * x for x in d)
    b = sum(x * y for x, y in zip(o, d))
    c = sum(x * x for x in o)
    root = b * b - a * (c - 1)
    return torch.where(root > 0, (root.clamp(min=0).sqrt() - b) / a, -torch.inf)


def render_heads(identity, pose, size, supersample=2):
    """Ray-cast one head with shoulders a picture, orthographic.

    identity  dict as from draw_identities, n of them
    pose      dict of [n] tensors yaw, pitch, roll (degrees), mouth (0..1), y, scale (of the picture's half
              side, y up), light and light_colour, shirt [n, 3]
    returns   [n, ., size, size] in 0..1: premultiplied rgb, alpha, and head (skin and hair, no body)
    """
    n, s = len(pose["yaw"]), size * supersample
    axis = (torch.arange(s) + 0.5) / s * 2 - 1
    # [n] becomes [n, 1], to go with rays [n, s*s]
    scale, y, open_mouth = pose["scale"][:, None], pose["y"][:, None], pose["mouth"][:, None]
    i = {name: tensor[:, None] if tensor.ndim == 1 else tensor for name, tensor in identity.items()}
    X, Y = axis.repeat(s) / scale, (-axis.repeat_interleave(s) - y) / scale
    R = rotation(pose["yaw"], pose["pitch"], pose["roll"])
    # The ray (X, Y, z) seen from the head: o + z*d, with the head's centre at 0 and its half height 1.
    o = [R[:, 0, j, None] * X + R[:, 1, j, None] * Y for j in range(3)]
    d = [R[:, 2, j, None] for j in range(3)]
    light = F.normalize(pose["light"], dim=1)
    head_light = torch.einsum("nij,ni->nj", R, light)
    width, depth, one = i["width"], i["depth"], torch.ones(n, 1)
    head, body = (o, d), ((X, Y, 0), (0, 0, 1))
    ear = (0.10, 0.2, 0.14)
    parts = {  # name: rays in the frame of the part, its centre and radii there
        "skull": (*head, (0, 0, 0), (width, one, depth)),
        "shell": (*head, (0, 0.03, -0.03), (width * 1.09, one * 1.07, depth * 1.09)),
        "nose": (*head, (0, -0.08, depth), (i["nose"] * 0.8, i["nose"] * 1.2, i["nose"] * 1.2)),
        "ear_left": (*head, (width, 0, 0), ear), "ear_right": (*head, (-width, 0, 0), ear),
        "neck": (*body, (0, -1.0, -0.1), (0.4, 0.6, 0.4)),
        "shoulders": (*body, (0, -1.95, -0.15), (1.05, 0.75, 0.6)),
    }
    z = {name: ellipsoid(*part) for name, part in parts.items()}

    def angles(name):
        """Azimuth (0 front, 90 the left view's side) and elevation of the ray's point on a part, degrees."""
        x, y, w = ((a + z[name].clamp(min=-9) * b - c) / r for a, b, c, r in zip(*parts[name]))
        return torch.atan2(x, w).rad2deg(), torch.asin(y.clamp(-1, 1)).rad2deg()

    def spot(az, el, at_az, at_el, size_az, size_el):
        return ((az - at_az) / size_az) ** 2 + ((el - at_el) / size_el) ** 2 < 1
    # Hair is the shell above the hairline, which falls from the fringe over the sideburn to the nape.
    az, el = angles("shell")
    at_side, at_back = ((az.abs() - 45) / 30).clamp(0, 1), ((az.abs() - 85) / 35).clamp(0, 1)
    line = i["fringe"] + (i["sideburn"] - i["fringe"]) * at_side + (i["nape"] - i["sideburn"]) * at_back
    z["shell"] = torch.where(el > line, z["shell"], -torch.inf)
    nearest, which = torch.stack(list(z.values())).max(dim=0)
    hit = nearest > -torch.inf
    on = {name: (which == j) & hit for j, name in enumerate(z)}

    skull, shell, not_shirt = on["skull"], on["shell"], hit & ~on["shoulders"]
    az_skin, el_skin = angles("skull")
    az, el = torch.where(shell, az, az_skin), torch.where(shell, el, el_skin)
    eye = (az_skin.abs() - 26, el_skin - 6)
    white = torch.ones(n, 3)
    layers = [  # (where, colour [n, 3]); later ones cover earlier ones
        (hit, pose["shirt"]),
        (not_shirt, i["skin"]),
        (on["nose"] | on["neck"], i["skin"] * 0.88),
        (skull & i["beard"] & (el_skin < -16) & (az_skin.abs() < 72), i["hair"] * 0.8),
        (skull & spot(*eye, 0, 17, 13, 3.5), i["hair"] * 0.55),
        (skull & spot(*eye, 0, 0, 13, 9.5), white * 0.97),
        (skull & spot(*eye, 0, 0, 7.5, 8.5), i["eyes"]),
        (skull & spot(*eye, 0, 0, 3, 3.5), white * 0.05),
        (skull & spot(az_skin, el_skin, 0, -33, 21, 5.5 + 8.5 * open_mouth), i["lips"]),
        (skull & spot(az_skin, el_skin, 0, -33, 14, 9 * open_mouth + 1e-3), white * 0.1),
        (shell, i["hair"]),
    ]
    for p, name in enumerate(PATCHES):
        from_centre = {"left": az - 119, "right": -az - 119, "back": az.abs() - 180}[name]
        height, radius = i["patch_height"][:, p, None], i["patch_size"][:, p, None]
        patch = (skull | shell) & spot(from_centre, el, 0, height, 1.2 * radius, radius)
        layers.append((patch, i[f"patch_{name}"]))
    top = torch.zeros(n, s * s, dtype=torch.int64)
    for j, (where, _) in enumerate(layers):
        top.masked_fill_(where, j)
    palette = torch.stack([colour for _, colour in layers], dim=1)  # [n, layers, 3]
    colour = palette.gather(1, top[..., None].expand(-1, -1, 3))

    shade = torch.zeros(n, s * s)
    for name, part in parts.items():
        toward = light if name in ("neck", "shoulders") else head_light
        normal = [(a + nearest.clamp(min=-9) * b - c) / (r * r) for a, b, c, r in zip(*part)]
        cosine = sum(m * t for m, t in zip(normal, toward.T[..., None])) / sum(m * m for m in normal).sqrt()
        shade = torch.where(on[name], cosine.clamp(min=0), shade)
    colour = colour * (0.55 + 0.5 * shade[..., None]) * pose["light_colour"][:, None]
    colour = colour.clamp(0, 1) * hit[..., None]
    channels = torch.cat((colour, hit[..., None], (not_shirt & ~on["neck"])[..., None]), dim=-1)
    channels = F.avg_pool2d(channels.transpose(1, 2).reshape(n, 5, s, s), supersample)
    return channels.split((3, 1, 1), dim=1)


def background(names, size):
    """Named backgrounds, a list of n -> float [n, 3, H, W] in 0..1, darker in the corners.
    Smooth on purpose: a small network spends its time on brick and checkered walls (head PSNR -1.9 dB)."""
    y, x = ((torch.arange(side) + 0.5) / side * 2 - 1 for side in size)
    bottom, top = torch.tensor([BACKGROUNDS[name] for name in names])[..., None, None].unbind(1)
    return torch.lerp(bottom, top, (1 - y[:, None]) / 2) * (1 - 0.08 * (x * x + y[:, None] ** 2))


def render_pictures(identities, pose, size):
    """render_heads for several pictures of each of n identities: pose has [n, pictures] where render_heads
    takes [n], and so has what comes back. Calls whose rays fit the CPU's cache are about 2.5x faster."""
    shape, step = pose["yaw"].shape, max(1, (1 << 18) // (2 * size) ** 2)
    pose = {name: tensor.flatten(0, 1) for name, tensor in pose.items()}
    heads = pick(identities, torch.arange(shape[0]).repeat_interleave(shape[1]))
    chunks = [render_heads(pick(heads, index), pick(pose, index), size)
              for index in torch.arange(shape.numel()).split(step)]
    return [torch.cat(chunk).unflatten(0, shape) for chunk in zip(*chunks)]


def clip_pose(clips, k, frames):
    """How person k stands in every frame of n clips: render_heads' pose, entries [n, frames, ...]."""
    u = torch.linspace(0, 1, frames)
    yaw, pitch, roll = torch.stack([torch.stack(MOTIONS[c.motions[k]](u)) for c in clips], dim=1)
    start, end = torch.tensor([ZOOMS[c.zoom] for c in clips]).T[..., None]
    lights = torch.tensor([LIGHTS[c.light] for c in clips])  # [n, 2, 3]
    shirts = torch.tensor([SHIRTS[c.shirts[k]] for c in clips])
    light, light_colour, shirt = (a[:, None].expand(-1, frames, -1) for a in (*lights.unbind(1), shirts))
    return {"yaw": yaw, "pitch": pitch, "roll": roll,
            "mouth": torch.stack([MOUTHS[c.mouths[k]](u) for c in clips]),
            "y": torch.full_like(yaw, 0.06), "scale": torch.lerp(start, end, u),
            "light": light, "light_colour": light_colour, "shirt": shirt}


def frame_size(size, n_people):
    """(H, W) of a toy clip: a square of `size` pixels for each person, side by side. A head is as many tokens
    large with two people as with one, so a network that draws one well need not learn it again."""
    return size, size * n_people


def render_clips(clips, cast, frames, size, poses=None):
    """Render n clips with these identities in them: exact ground truth for anybody.

    clips    n Clips with equally many people
    cast     one identities dict per person, each of n identities; None leaves that person out
    poses    {k: entries of person k's pose dict, [n, frames], instead of the clips' own}
    returns  video [n, 3, frames, *frame_size] in -1..1, head masks [n, people, frames, *frame_size] in 0..1
    """
    n, (H, W) = len(clips), frame_size(size, len(cast))
    video = background([c.background for c in clips], (H, W))[:, :, None].repeat(1, 1, frames, 1, 1)
    masks = torch.zeros(n, len(cast), frames, H, W)
    for k, identities in enumerate(cast):
        if identities is None:
            continue
        pose = clip_pose(clips, k, frames) | (poses or {}).get(k, {})
        pictures = render_pictures(identities, pose, size)
        rgb, alpha, head = (picture.transpose(1, 2) for picture in pictures)  # [n, ., F, S, S]
        square = slice(k * size, (k + 1) * size)
        video[..., square] = rgb + (1 - alpha) * video[..., square]
        masks[:, k, ..., square] = head[:, 0]
    return video * 2 - 1, masks


def reference_pose(n, seed):
    """How n people stand in the four VIEWS of their cross-pair references: entries [n * V, ...]."""
    V, g = len(VIEWS), torch.Generator().manual_seed(seed)

    def jitter(size_of):
        return size_of * (2 * torch.rand(n * V, generator=g) - 1)
    lights, colours = torch.tensor(list(LIGHTS.values())).unbind(1)
    shirts = torch.tensor(list(SHIRTS.values()))
    light = torch.randint(len(LIGHTS), (n * V,), generator=g)
    return {"yaw": torch.tensor([VIEW_YAW[v] for v in VIEWS]).repeat(n) + jitter(8),
            "pitch": jitter(6), "roll": jitter(4), "mouth": torch.rand(n * V, generator=g).round(),
            "light": lights[light], "light_colour": colours[light],
            "shirt": shirts[torch.randint(len(SHIRTS), (n * V,), generator=g)],
            "y": torch.full((n * V,), 0.06), "scale": 0.66 + jitter(0.03)}


def render_references(identities, seed, size, clips=None, k=0, frames=6):
    """The four VIEWS of n identities on white, [n, V, 3, size, size] in -1..1.

    Cross-pair (clips is None): each has a light, shirt, mouth and slight turn of its own, drawn from seed.
    In-pair: person k of n clips as it looks in the clip's frame that comes nearest to the view, re-framed.
    """
    n = len(identities["width"])
    pose = {name: v.unflatten(0, (n, len(VIEWS))) for name, v in reference_pose(n, seed).items()}
    if clips is not None:
        of_clip = clip_pose(clips, k, frames)
        nearest = view_distance(of_clip["yaw"]).argmin(dim=2)  # [n, V]
        pose |= {name: v[torch.arange(n)[:, None], nearest] for name, v in of_clip.items()
                 if name not in ("y", "scale")}  # framed as a reference
    rgb, alpha, _ = render_pictures(identities, pose, size)
    return (rgb + (1 - alpha)) * 2 - 1


def view_distance(yaw):
    """yaw [n, F] -> degrees between each frame and each view, [n, V, F]."""
    turn = yaw[:, None] - torch.tensor([VIEW_YAW[v] for v in VIEWS])[:, None]
    return ((turn + 180) % 360 - 180).abs()


# ----------------------------------------------------------------------------------------- the toy's encoders
# What configs of model.CONFIGS train on: pixels a side, frames, clips rendered once with one person, with two
WORLDS = {
    "tiny": dict(size=32, frames=3, clips=(12, 12)),
    "toy": dict(size=32, frames=6, clips=(1600, 1600)),
    "toy64": dict(size=64, frames=8, clips=(2400, 2400)),
    "1.3b": dict(size=256, frames=17, clips=(0, 0)),  # bench.py's clips; these train on real ones
    "14b": dict(size=256, frames=17, clips=(0, 0)),
}
TEXT_DIM, VIT_DIM, VIT_LEVELS = 96, 96, (1, 3)


def check_config(config):
    """UserError where a network's MFI reads another number of ViT levels than ToyEncoders gives."""
    if config.vit_dim and config.vit_levels != len(VIT_LEVELS):
        raise UserError(f"this network reads {config.vit_levels} levels of the ViT, toy.VIT_LEVELS names "
                        f"{len(VIT_LEVELS)}: set vit_levels in model.TOY to the same, or train anew")


def world_of(row):
    """What a checkpoint says of the world that it was trained on. row: of WORLDS"""
    return {"size": row["size"], "frames": row["frames"], "codec": codec_of(row["size"])}


@functools.cache
def codec_of(size):
    """A name for what ToyCodec makes of pixels: another codec has another name."""
    ramp = torch.linspace(-1, 1, 3 * 2 * size**2).view(1, 3, 2, size, size)
    latent = ToyCodec(size).encode(ramp)
    return fingerprint(latent.shape, to_bytes(latent).flatten().tolist())


# of checkpoints before 2026-12-01, which do not name theirs
FIRST_CODECS = {32: "49f294e850d15b8eb92a", 64: "cd5cf0062660504f6f1b"}


def check_world(folder, meta):
    """The world of a checkpoint, as world_of. UserError where this version draws or encodes another one."""
    world, known = meta.get("world", {}), [world_of(row) for row in WORLDS.values() if row["size"] <= 64]
    world = {"codec": FIRST_CODECS.get(world.get("size"))} | world
    if {**world, "codec": ""} not in [{**row, "codec": ""} for row in known]:
        raise UserError(f"{folder}/checkpoint.json: its world {world!r:.60} is none of toy.WORLDS")
    if world not in known:
        raise UserError(f"{folder} was trained on latents of another codec than toy.ToyCodec is now: start "
                        "with --scratch, or take the codec that it had")
    return known[known.index(world)]


class ToyCodec:
    """The toy's exactly invertible VAE: stride x stride pixels of a frame become one latent of 3 stride^2
    channels. A head has 8 x 8 of them at any size in pixels."""

    def __init__(self, size):
        self.stride = max(4, size // 8)

    def encode(self, video):
        """[B, 3, F, H, W] in -1..1 -> [B, C, F, H/stride, W/stride]; H and W are multiples of the stride."""
        return F.pixel_unshuffle(video.transpose(1, 2), self.stride).transpose(1, 2)

    def decode(self, latent):
        return F.pixel_shuffle(latent.transpose(1, 2), self.stride).transpose(1, 2)

    def latent_shape(self, frames, size):
        """(C, T, H, W) of the latents of a clip of size (H, W) in pixels."""
        return 3 * self.stride**2, frames, size[0] // self.stride, size[1] // self.stride


class ToyEncoders(ToyCodec):
    """The toy's frozen networks: those of encoders.py, small and random from a fixed seed. Its members are
    WanEncoders'. folder holds the trained TOKENIZER; the reference pictures are squares of `size` pixels."""
    TOKENIZER = "spiece.model"
    name = "toy"
    latent_dtype = torch.uint8  # in a cache: latents are pixels, so 8 bits hold them exactly
    vit_shape = [len(VIT_LEVELS), VIT_DIM]

    def __init__(self, folder, size):
        super().__init__(size)
        self.mask_block = 2 * self.stride  # pixels of one token
        self.files = [Path(folder) / self.TOKENIZER]  # what a checkpoint has to hold with the network
        self.tokenizer = Tokenizer(self.files[0])
        with torch.random.fork_rng([]):
            torch.manual_seed(7)
            self.t5 = UMT5(vocab=len(self.tokenizer.model), dim=TEXT_DIM, ffn_dim=2 * TEXT_DIM,
                           num_heads=6, num_layers=2).requires_grad_(False).eval()
            self.vit = DINOv2(dim=VIT_DIM, num_layers=4, num_heads=3, patch=size // 4, image_size=size,
                              levels=VIT_LEVELS).requires_grad_(False).eval()
            # attention that looks at near words, or two people's clauses would read alike
            for block in self.t5.blocks:
                torch.nn.init.normal_(block.pos_embedding.embedding.weight, std=3)
                torch.nn.init.normal_(block.attn.q.weight, std=0.5 / TEXT_DIM)
            torch.nn.init.normal_(self.vit.pos_embed, std=0.5)

    @torch.no_grad()
    def text(self, captions):
        """Captions -> text tokens [B, S, TEXT_DIM], zero beyond each one's length."""
        ids, mask = self.tokenizer(captions)
        return self.t5(ids, mask) * mask[..., None]

    @torch.no_grad()
    def features(self, image):
        """Frontal references [B, 3, H, W] in -1..1 -> [B, levels, tokens, VIT_DIM]."""
        return self.vit(2 * image)  # the toy's pictures have half the spread of ImageNet-normalised ones

    def decode(self, latent):
        return super().decode(latent).clamp(-1, 1)

    def drop(self):
        """Nothing to free: they are small."""


def train_tokenizer(path):
    """A sentencepiece model of the toy's captions with umT5's special ids: pad 0, </s> 1, unknown 2. Half of
    them describe the people: all training sets share one tokenizer, and so one text encoder."""
    captions = []
    for n_people in (1, 2):
        people, clips = draw_identities(2000, n_people), draw_clips(2000, n_people, "tokenizer")
        for i, clip in enumerate(clips):
            looks = [describe(people, i - k) for k in range(n_people)]
            captions += [caption(clip), caption(clip, looks)]
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(captions), model_writer=file, vocab_size=360, model_type="bpe",
            hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2)


# -------------------------------------------------------------------------------------------- training clips
IN_PAIR_MOTIONS = ("sweeps rightwards", "sweeps leftwards", "looks around")
IN_PAIR_VIEWS = ("front", "left", "right")  # each of them shows these and no back
CHUNK = 64  # training clips that are rendered together


def training_set(root, size, frames, clips, pairs="cross", mask=0.0, seed=TRAIN_SEED, described=0.0):
    """The encoded set of the toy's training clips, rendered and encoded once -> its folder below root.

    clips      how many with one person and with two
    pairs      "cross": references with a light, shirt and pose of their own; "in": frames of the clip itself
    mask       region masking, as encode's
    seed       TRAIN_SEED, or VALID_SEED for people that training does not see
    described  share of the captions that tell the people's looks too
    """
    code = source_hash("networks/encoders", "networks/text", "videos/encode", "videos/pictures", "videos/toy")
    kind = "toy" if seed == TRAIN_SEED else f"toy{seed}"
    told = f"-described{described:g}" if described else ""
    name = f"{kind}-{size}px-{frames}f-{clips[0]}+{clips[1]}-{pairs}{told}-mask{mask:g}-{code}"
    folder, tokenizer = Path(root) / name, tokenizer_of(root)
    if not (folder / tokenizer.name).exists():
        with lock(root, wait=True):
            if not (folder / tokenizer.name).exists():  # by now, of another process
                samples = training_samples(size, frames, clips, pairs, seed, described)
                encode(samples, folder, ToyEncoders(tokenizer.parent, size), {}, mask)
                shutil.copy(tokenizer, folder)  # last: now the set is whole
    if (folder / tokenizer.name).read_bytes() != tokenizer.read_bytes():
        raise UserError(f"{folder / tokenizer.name} is damaged: delete its folder, it is made again")
    return folder


def tokenizer_of(root):
    """The file of the toy's tokenizer, trained once for all sets below root."""
    path = Path(root) / f"tokenizer-{source_hash('videos/toy')}" / ToyEncoders.TOKENIZER
    if not path.exists():
        with lock(path.parent, wait=True):
            if not path.exists():  # by now, of another process
                with atomic_file(path) as temporary:
                    train_tokenizer(temporary)
    return path


def training_samples(size, frames, clips, pairs, seed, described):
    """The training clips as Samples, which are rendered when they are read. Arguments as of training_set."""
    samples, views, motions = [], VIEWS, (*MOTIONS, *SWEEPS)  # sweeps twice: they show what references show
    if pairs == "in":
        views, motions = IN_PAIR_VIEWS, IN_PAIR_MOTIONS
    for n_people, n in zip((1, 2), clips):
        part = draw_clips(n, n_people, seed, motions)
        identities = training_identities(n, n_people, seed)
        render = functools.lru_cache(2)(functools.partial(
            render_training, part, identities, n_people, size, frames, pairs))
        for i, words in enumerate(captions_of(part, identities, n_people, seed, described)):
            name = f"{len(samples) % 100:02d}-{len(samples):06d}"
            people = [{view: reader(render, i, "refs", k, VIEWS.index(view)) for view in views}
                      for k in range(n_people)]
            cross = [dict.fromkeys(views, pairs == "cross") for _ in people]
            ids = [f"toy {seed} {name} {k}" for k in range(n_people)]  # everybody is in one clip
            video = reader(render, i, "video")
            samples.append(Sample(name, f"clip {name}", words, video, people, cross, ids))
    return samples


def reader(render, i, kind, *where):
    """A function that gives clip i's video, or a picture of it, in -1..1."""
    def read():
        stored = render(i - i % CHUNK)[kind][i % CHUNK]
        for index in where:
            stored = stored[index]
        return from_bytes(stored)
    return read


def training_identities(n, n_people, seed):
    """Those of n training clips: person k of clip i is number i + k * n."""
    return draw_identities(n * n_people, seed + n_people)


def captions_of(clips, identities, n_people, seed, described):
    """The captions of training clips. A clip's own draw decides whether it tells the looks."""
    n, rng = len(clips), random.Random(seed + n_people)
    return [caption(clip, [describe(identities, i + k * n) for k in range(n_people)]
                    if rng.random() < described else None) for i, clip in enumerate(clips)]


def render_training(clips, identities, n_people, size, frames, pairs, start):
    """The CHUNK clips from number `start` on, with their references: video uint8 [n, 3, F, H, W], refs uint8
    [n, people, V, 3, size, size]."""
    chunk = clips[start:start + CHUNK]
    index = torch.arange(start, start + len(chunk))
    cast = [pick(identities, index + k * len(clips)) for k in range(n_people)]
    refs = [render_references(cast[k], 10**6 * n_people + 10**5 * k + start, size,
                              chunk if pairs == "in" else None, k, frames) for k in range(n_people)]
    return {"video": to_bytes(render_clips(chunk, cast, frames, size)[0]),
            "refs": to_bytes(torch.stack(refs, dim=1))}


# ---------------------------------------------------------------------------------------------- the benchmark
@functools.cache
def benchmark_cases():
    """The 100 fixed cases, 60 with one person and 40 with two, who all sweep: [(Clip, identity indices)]."""
    cases = []
    for n_people, n in ((1, 60), (2, 40)):
        rng = random.Random(f"{BENCHMARK_SEED}-{n_people}")
        for _ in range(n):
            clip = draw_clip(rng, n_people, SWEEPS)
            cases.append((clip, tuple(rng.sample(range(BENCHMARK_IDENTITIES), n_people))))
    return cases


def benchmark_people():
    """The 52 held-out identities."""
    return draw_identities(BENCHMARK_IDENTITIES, BENCHMARK_SEED)


def benchmark_truth(number, frames, size):
    """A case's video as it should be, [3, frames, H, W] in -1..1."""
    clip, indices = benchmark_cases()[number]
    return render_clips([clip], [pick(benchmark_people(), i) for i in indices], frames, size)[0][0]


@functools.lru_cache(maxsize=2)
def benchmark_references(size):
    """Their cross-pair references, [52, V, 3, size, size] in -1..1."""
    return render_references(benchmark_people(), BENCHMARK_SEED, size)


# what `python sample.py` shows: benchmark cases whose heads turn all the way, and the views given
SHOWN = ((50, VIEWS), (50, ("front",)), (55, VIEWS), (98, VIEWS))


def held_out(views, frames, size):
    """Jobs of SHOWN: people that training never saw. views: the views to give, None: those of SHOWN."""
    jobs, shown = [], [(case, default if views is None else tuple(views)) for case, default in SHOWN]
    for case, given in dict.fromkeys(shown):
        clip, indices = benchmark_cases()[case]
        references = held_out_references(indices, given, size)
        jobs.append(Job(caption(clip), references, size=frame_size(size, len(indices)),
                        truth=benchmark_truth(case, frames, size),
                        note=f" (given: {', '.join(given) or 'nothing'})"))
    return jobs


def held_out_references(indices, views, size):
    """One {view: picture [3, size, size]} for each of these held-out people."""
    pictures = benchmark_references(size)
    return [{view: pictures[i, VIEWS.index(view)] for view in views} for i in indices]


# -------------------------------------------------------------------------------------------------------- CLI
TEXT_LEN = 128  # most tokens that the toy's network reads: text_len of model.CONFIGS["toy"]
FILM_SEED, FILM_PEOPLE, HELD_OUT = 31_000, 24, 8  # the last ones are in no training video


@functools.cache
def film_people():
    """Everybody in the videos of write_films."""
    return draw_identities(FILM_PEOPLE, FILM_SEED)


def write_films(folder, n, held_out, size, frames, fps):
    """n videos with a caption beside each, to curate as if they were anybody's: one person in each, everybody
    in several. held_out: of the people that are for cases only"""
    first, many = (FILM_PEOPLE - HELD_OUT, HELD_OUT) if held_out else (0, FILM_PEOPLE - HELD_OUT)
    rng = random.Random(f"{FILM_SEED}-{first}")
    if taken := sorted(folder.glob("film*")):
        raise UserError(f"{taken[0]} exists: choose another --out")
    for k in progress(range(n), "drawing", "videos"):
        clip, name = draw_clip(rng, 1, SWEEPS), f"film{k:04d}"
        video = render_clips([clip], [pick(film_people(), first + k % many)], frames, size)[0][0]
        write_video(folder / f"{name}.mp4", video, fps)
        with atomic_file(folder / f"{name}.txt") as path:
            path.write_text(f"{caption(clip)}\n")
    print(f"{n} videos of {min(n, many)} people: {folder}")


def encode_films(args):
    """`data.py encode --wan toy`: encode a curated folder with the toy's networks for train.py --config
    toy, with its tokenizer. Of the flags it reads --data, --out and --fps; the rest is as toy clips are."""
    size, frames, data, fps = WORLDS["toy"]["size"], WORLDS["toy"]["frames"], Path(args.data), args.fps
    out = Path(args.out or data / "encoded")
    probe_writable(out)
    shape = {"size": size, "frames": frames, "fps": fps, "networks": "toy"}
    encoders, samples = ToyEncoders(ROOT / "assets/base", size), []
    encoders.tokenizer.max_len = TEXT_LEN
    for entry in read_manifest(data):
        clip = sample_of(entry, data, [frame_size(size, len(entry["identities"]))], [frames], fps)
        square = sample_of(entry, data, [(size, size)], [frames], fps)
        samples.append(clip._replace(people=square.people))
    encoded, failed = encode(samples, out, encoders, shape)
    shutil.copy(encoders.files[0], out)
    print(f"{out}: {encoded} clips encoded, {failed} left out (failed.jsonl has the reasons)")


NAMES = ("ann", "ben", "cho", "dan")  # the first held-out identities


def main(argv=None):
    p = Parser(prog="data.py toy", description=__doc__)
    add = p.add_argument
    add("--out", required=True, type=nonempty, help="folder to write to")
    add("--size", type=in_range(int, 16, 1024, "16 to 1024 pixels"), default=128, help="pixels a side, even")
    add("--frames", type=in_range(int, 1, 1000, "1 to 1000 frames"), default=16, help="frames of a clip")
    add("--fps", type=frame_rate, default=8, help="frames per second")
    add("--films", type=count, help="write so many videos to curate, with captions: see videos/README.md")
    add("--held-out", action="store_true", help="with --films: of people who are for cases, not for training")
    args = p.parse_args(argv)
    if args.size % 2:
        raise UserError(f"--size {args.size}: expected an even number of pixels")
    probe_writable(args.out)
    if args.films:
        return write_films(Path(args.out), args.films, args.held_out, args.size, args.frames, args.fps)
    write_samples(Path(args.out), args.size, args.frames, args.fps)


def write_samples(folder, size, frames, fps):
    """Four clips of four people that training never sees, with their references and captions, as files."""
    clips, captions, lines = {}, "", ""
    for n, indices in enumerate(((0,), (1,), (0, 1), (2, 3)), 1):
        clip = draw_clip(random.Random(n), len(indices), SWEEPS)
        cast = [{"id": NAMES[i], "views": {view: {"image": f"{NAMES[i]}_{view}.png", "cross": True}
                                           for view in VIEWS}} for i in indices]
        clips[f"clip{n}.mp4"] = indices, clip
        captions += f"{caption(clip)}\n"
        lines += json.dumps({"video": f"clip{n}.mp4", "caption": caption(clip), "identities": cast}) + "\n"
    identities = benchmark_people()
    shown = render_references(pick(identities, range(len(NAMES))), BENCHMARK_SEED, size)
    pictures = {f"{name}_{view}.png": picture for name, views in zip(NAMES, shown)
                for view, picture in zip(VIEWS, views)}
    texts = {"manifest.jsonl": lines, "captions.txt": captions}  # the manifest first: it marks the folder
    manifest = folder / "manifest.jsonl"
    taken = [name for name in (*texts, *pictures, *clips) if os.path.lexists(folder / name)]
    if taken and not (manifest.is_file() and manifest.read_bytes() == lines.encode()):
        raise UserError(f"{folder / taken[0]} is not of the toy: choose another --out")
    for name, text in texts.items():
        with atomic_file(folder / name) as path:
            path.write_text(text)
    for name, picture in pictures.items():
        with atomic_file(folder / name) as path:
            to_image(picture, size).save(path)
    for name, (indices, clip) in clips.items():
        video = render_clips([clip], [pick(identities, i) for i in indices], frames, size)[0][0]
        write_video(folder / name, video, fps)
        print(f"{folder}/{name}, {' and '.join(NAMES[i] for i in indices)}: {caption(clip)}")
