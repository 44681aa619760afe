"""An identity network out of a package, for tests: dlib's ResNet-29 as the npm package @vladmandic/face-api
(MIT) ships it, most weights in bytes. It is no ArcFace: its vectors are not centred, so that strangers have
cosines of 0.9. `npm pack` fetches it; nothing is committed or installed."""

import json
import shutil
import subprocess
import tarfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mtcnn import MTCNN, fetch_mtcnn

PACKAGE = "@vladmandic/face-api@1.7.15"
MEAN = (122.782, 117.001, 104.298)  # of RGB
PLAIN = {"dtype": "float32", "scale": 1, "min": 0}  # of what is not in bytes
BLOCKS = ("conv32_1", "conv32_2", "conv32_3", "conv64_down", "conv64_1", "conv64_2", "conv64_3",
          "conv128_down", "conv128_1", "conv128_2", "conv256_down", "conv256_1", "conv256_2",
          "conv256_down_out")


def fetch_weights(folder):
    """{name: tensor} of the package's identity network. Skips the test where it cannot be fetched."""
    if not shutil.which("npm"):
        pytest.skip("no npm to fetch an identity network with")
    command = ["npm", "pack", PACKAGE]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        reason = (done.stderr.strip().splitlines() or ["?"])[-1] if done.returncode else None
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    if reason:
        pytest.skip(f"{PACKAGE} cannot be fetched: {reason}")
    with tarfile.open(next(folder.glob("vladmandic-face-api-*.tgz"))) as package:
        stem = "package/model/face_recognition_model"
        manifest = json.load(package.extractfile(f"{stem}-weights_manifest.json"))
        data = package.extractfile(f"{stem}.bin").read()
    weights, at = {}, 0
    for entry in manifest[0]["weights"]:
        n, how = int(np.prod(entry["shape"])), entry.get("quantization", PLAIN)
        values = np.frombuffer(data, how["dtype"], n, at)
        at += values.nbytes
        values = torch.from_numpy(values.astype(np.float32)) * how["scale"] + how["min"]
        weights[entry["name"]] = values.view(entry["shape"])
    assert at == len(data)
    return weights


def convolve(w, x, name, stride=1, relu=True):
    """A convolution and its scale. Stride 2 comes without padding, as in dlib."""
    kernel = w[f"{name}/conv/filters"].permute(3, 2, 0, 1)
    x = F.conv2d(x, kernel, w[f"{name}/conv/bias"], stride, 0 if stride == 2 else kernel.shape[-1] // 2)
    x = x * w[f"{name}/scale/weights"][:, None, None] + w[f"{name}/scale/biases"][:, None, None]
    return x.relu() if relu else x


def describe(w, crops):
    """Aligned crops [N, 3, 112, 112] in -1..1 -> [N, 128]."""
    crops = F.interpolate(crops, (150, 150), mode="bilinear", antialias=True)
    x = ((crops + 1) * 127.5 - torch.tensor(MEAN)[:, None, None]) / 255
    x = F.max_pool2d(convolve(w, x, "conv32_down", 2), 3, 2)
    for name in BLOCKS:
        down = "down" in name
        y = convolve(w, convolve(w, x, f"{name}/conv1", 2 if down else 1), f"{name}/conv2", relu=False)
        if down:  # the shorter one of the two, in every direction, is filled up with zeros
            x = F.avg_pool2d(x, 2)
            y = F.pad(y, (0, x.shape[3] - y.shape[3], 0, x.shape[2] - y.shape[2]))
            x = F.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))
        x = (x + y).relu()
    return x.mean((2, 3)) @ w["fc"]


class MTCNNWithIdentity(MTCNN):
    """MTCNN, and that network for embed."""

    def __init__(self, mtcnn, weights):
        self.__dict__ |= mtcnn.__dict__
        self.weights = weights

    @torch.no_grad()
    def embed(self, crops):
        return F.normalize(describe(self.weights, crops), dim=1)


def fetch_identity(folder):
    return MTCNNWithIdentity(fetch_mtcnn(folder), fetch_weights(folder))
