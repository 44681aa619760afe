"""The face networks of the toy world: `--faces toy`, so that everything can be tried without a download.

Heads of the people in the toy's videos are rendered in all yaws and lights. Where a picture is nearest to a
rendering, there is a head, that person's, turned like that: eval.py's rule. It reads pixels, so it measures
generated videos too, and knows nobody but toy.film_people.
"""
import itertools

import torch
import torch.nn.functional as F

from networks.faces import ALIGNED, Detection, Faces, RetinaFace, iou
from support.script import source_hash
from videos import toy

SIDE = 24  # pixels of a rendering, and of what is compared with it; half as many where heads are looked for
YAWS = torch.arange(-180.0, 180, 15)
SCALE = 0.9  # of a head in its rendering: a box is a square of 2 / SCALE half heights of the head
SIDES = (0.52, 0.58, 0.65, 0.72, 0.8, 0.88)  # of a box, in heights of a picture
PLACES = torch.stack(torch.meshgrid([(torch.arange(SIDE) + 0.5) / SIDE - 0.5] * 2, indexing="xy"), dim=-1)
SHARP = 0.001  # difference of these errors at which one of two people is e times as likely


def is_toy(folder):
    """Does --faces ask for these, and not for a folder of that name."""
    return str(folder) == "toy" and not any(folder.glob(Faces.FILES[RetinaFace]))


def load_faces(folder, device, kind):
    """What --faces names: these, or the networks in a folder as this kind of Faces."""
    return ToyFaces() if is_toy(folder) else kind(folder, device)


def toy_code(folder):
    """What results depend on, besides files of networks."""
    return [source_hash("videos/toy", "videos/toyfaces")] if is_toy(folder) else []


class Renderings:
    """Heads [M, 3, S, S] in 0..1 with masks [M, S, S], to be compared with pictures."""

    def __init__(self, heads, masks):
        self.side, heads = heads.shape[-1], heads.flatten(1)
        weights = masks.flatten(1).repeat(1, 3) / (3 * masks.sum((1, 2)))[:, None]
        self.square, self.linear = weights.T.contiguous(), -2 * (weights * heads).T.contiguous()
        self.constant = (weights * heads**2).sum(1)

    def errors(self, pictures):
        """Pictures [N, 3 S S] in 0..1 -> their mean squared error from each head, on it [N, M]."""
        return pictures**2 @ self.square + pictures @ self.linear + self.constant


    def unlike(self, pictures):
        """The least of a picture's errors, as a share of the variance of its colours [N]: a bare wall is like
        the back of many a head, but has no variance."""
        return self.errors(pictures).amin(1) / pictures.unflatten(1, (3, -1)).var(2).mean(1).clamp(min=1e-4)


class ToyFaces:
    """Its methods are faces.Faces'."""

    def __init__(self):
        lights, colours = (torch.tensor(values) for values in zip(*toy.LIGHTS.values()))
        self.people, turns = toy.film_people(), len(YAWS) * len(lights)
        n = len(self.people["width"])
        zero = torch.zeros(n, turns)
        pose = dict.fromkeys(("pitch", "roll", "mouth", "y"), zero)
        pose |= {"yaw": YAWS.repeat(len(lights)).expand(n, -1), "scale": zero + SCALE,
                 "light": lights.repeat_interleave(len(YAWS), 0).expand(n, -1, -1),
                 "light_colour": colours.repeat_interleave(len(YAWS), 0).expand(n, -1, -1),
                 "shirt": zero[..., None].expand(-1, -1, 3)}
        rgb, _, head = (part.flatten(0, 1) for part in toy.render_pictures(self.people, pose, SIDE))
        inside = (head[:, 0] > 0.99).float()
        self.fine, self.yaw = Renderings(rgb, inside), pose["yaw"].flatten()
        inside = (F.avg_pool2d(inside, 2) > 0.99).float()
        self.coarse = Renderings(F.avg_pool2d(rgb, 2), inside)

    @torch.no_grad()
    def detect(self, images, least=0.5):
        """Pictures [B, 3, H, W] in -1..1 -> for each a list of Detections that score more than `least`."""
        return [[face for face in self.search((image + 1) / 2) if face.score > least] for image in images]

    def search(self, image):
        """As many heads as squares stand side by side in a picture without its white edges."""
        coloured = (image < 0.97).any(0)
        rows, columns = (coloured.any(axis).nonzero()[:, 0] for axis in (1, 0))
        if not len(rows):
            return []
        top, left = rows[0].item(), columns[0].item()
        image = image[:, top:rows[-1] + 1, left:columns[-1] + 1]
        height, width = image.shape[1:]
        found = []  # error, then the box
        for share in SIDES:
            side = share * height
            size = [max(self.coarse.side, round(n * self.coarse.side / side)) for n in (height, width)]
            small = F.interpolate(image[None], size, mode="bilinear", antialias=True)
            errors = self.coarse.unlike(F.unfold(small, self.coarse.side)[0].T)
            across = size[1] - self.coarse.side + 1
            for place in errors.argsort()[:8].tolist():
                y, x = (part * n / m for part, n, m in zip(divmod(place, across), (height, width), size))
                found.append((errors[place].item(), torch.tensor((x, y, x + side, y + side))))
        taken = []  # the boxes of each place
        for _, box in sorted(found, key=lambda one: one[0]):
            near = [boxes for boxes in taken if iou(box, boxes[0][None]) >= 0.1]
            if near:
                near[0].append(box)
            elif len(taken) < max(1, round(width / height)):
                taken.append([box])
        return [self.refine(image, torch.stack(boxes), torch.tensor((left, top))) for boxes in taken]

    def refine(self, image, boxes, corner):
        """The best box near some, as a Detection of the whole picture."""
        size = [max(2, round(n * SIDE / (boxes[0, 2] - boxes[0, 0]).item())) for n in image.shape[1:]]
        small = F.interpolate(image[None], size, mode="bilinear", antialias=True)  # no pixel is passed over
        centres, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2] - boxes[:, 0]
        for step in (0.06, 0.06, 0.04, 0.02, 0.01, 0):
            at = centres[:, None, None] + sides[:, None, None, None] * PLACES
            grid = 2 * at / torch.tensor(image.shape[:0:-1]) - 1
            crops = F.grid_sample(small.expand(len(grid), -1, -1, -1), grid, padding_mode="border",
                                  align_corners=False)
            errors = self.fine.unlike(crops.flatten(1))
            best = errors.argmin()
            centre, side = centres[best], sides[best]
            steps = torch.tensor(list(itertools.product((0, -step, step), repeat=3)))
            centres, sides = centre + side * steps[:, :2], side * (1 + steps[:, 2])
        low = centre - side / 2 + corner
        points = low + side * torch.tensor(ALIGNED) / 112
        return Detection(torch.cat((low, low + side)), 1 - 0.5 * errors[best].item(), points)

    def errors_of(self, crops):
        """Crops [N, 3, S, S] in -1..1 of boxes -> their errors from all renderings [N, M]."""
        return self.fine.errors(((F.interpolate(crops, (SIDE, SIDE), mode="area") + 1) / 2).flatten(1))

    @torch.no_grad()
    def embed(self, crops):
        """Crops of faces.align -> unit vectors [N, people + lights]: how likely it is each of them, and a
        little of the light, as one face in two takes is never quite the same."""
        errors = self.errors_of(crops).unflatten(1, (-1, len(toy.LIGHTS), len(YAWS))).amin(3)
        who, light = (F.normalize((-errors.amin(axis) / (2 * SHARP)).softmax(1), dim=1) for axis in (2, 1))
        return F.normalize(torch.cat((who, 0.3 * light), dim=1), dim=1)

    @torch.no_grad()
    def pose(self, crops, landmarks=None):
        """Crops of faces.crop_faces -> yaw, pitch, roll [N, 3] in degrees; pitch and roll are not read: 0."""
        edge = round(crops.shape[-1] * 0.2 / 1.4)  # the margin around a box
        likely = (-self.errors_of(crops[..., edge:-edge, edge:-edge]) / SHARP).softmax(1)
        x, y = (likely @ part for part in (self.yaw.deg2rad().cos(), self.yaw.deg2rad().sin()))
        yaw = torch.atan2(y, x).rad2deg()
        return torch.stack((yaw, 0 * yaw, 0 * yaw), dim=1)
