import itertools
import math
import os

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from mtcnn import fetch, fetch_mtcnn
from PIL import Image
from safetensors.torch import load_file, save_file

from networks import faces
from networks.faces import (ALIGNED, MEAN_FACE, MOST_FACES, ArcFace, Detection, Faces, MobileNet, ResNet,
                            RetinaFace, SixDRepNet, align, angles_of, crop_faces, decode, find_faces, iou,
                            load_released, nms, priors, rotation_of, similarity)
from support.script import UserError
from videos import toy


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randomise(network):
    """Weights and statistics that keep activations near one."""
    for name, tensor in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            tensor.fill_(5)
        elif name.endswith("running_mean") or name.endswith("bias"):
            tensor.copy_(0.1 * torch.randn_like(tensor))
        elif tensor.ndim > 1:
            tensor.copy_(torch.randn_like(tensor) * (2 / tensor[0].numel()) ** 0.5)
        else:
            tensor.copy_((0.25 if "prelu" in name else 1) + 0.1 * torch.rand_like(tensor))
    return network.eval()


def small(kind):
    return randomise(
        {"mobile": lambda: RetinaFace(MobileNet(4), 16),
         "resnet": lambda: RetinaFace(ResNet(4, (1, 2, 2, 1)), 72),
         "arcface": lambda: ArcFace(4, (1, 2, 3, 1), 16),
         "pose": lambda: SixDRepNet((4, 8, 8, 16, 32), (2, 3, 2, 1))}[kind]()
    )


NAMES = {"mobile": "detection_mobilenet0.25_Final.pth", "resnet": "detection_Resnet50_Final.pth",
         "arcface": "backbone.pth", "pose": "6DRepNet_300W_LP_AFLW2000.pth"}
KINDS = {"mobile": RetinaFace, "resnet": RetinaFace, "arcface": ArcFace, "pose": SixDRepNet}


def folder_of(path, *kinds):
    path.mkdir(exist_ok=True)
    for kind in kinds:
        torch.save(small(kind).state_dict(), path / NAMES[kind])
    return path


# ---------------------------------------------------------------------------- names and sizes of the releases
# A second writing of the naming rules, as rows of (name, shape), checked once against facexlib, arcface_torch
# and sixdrepnet themselves (LOG.md).
def norm(name, dim):
    return [(f"{name}.{leaf}", (dim,)) for leaf in ("weight", "bias", "running_mean", "running_var")] + [
        (f"{name}.num_batches_tracked", ())
    ]


def conv(name, dim_out, dim_in, kernel=3, bias=False):
    return [(f"{name}.weight", (dim_out, dim_in, kernel, kernel))] + [(f"{name}.bias", (dim_out,))] * bias


def pair(name, dim_out, dim_in, kernel=3):
    return conv(f"{name}.0", dim_out, dim_in, kernel) + norm(f"{name}.1", dim_out)


def retina_rows(body, dims, dim):
    rows = body[:]
    for i, d in enumerate(dims, 1):
        rows += pair(f"fpn.output{i}", dim, d, 1) + (pair(f"fpn.merge{i}", dim, dim) if i < 3 else [])
        half, quarter = dim // 2, dim // 4
        rows += pair(f"ssh{i}.conv3X3", half, dim) + pair(f"ssh{i}.conv5X5_1", quarter, dim)
        for name in ("conv5X5_2", "conv7X7_2", "conv7x7_3"):
            rows += pair(f"ssh{i}.{name}", quarter, quarter)
        for name, values in (("ClassHead", 4), ("BboxHead", 8), ("LandmarkHead", 20)):
            rows += conv(f"{name}.{i - 1}.conv1x1", values, dim, 1, bias=True)
    return dict(rows)


def mobile_rows():
    rows, dim = pair("body.stage1.0", 8, 3), 8
    for stage, widths in enumerate(([16, 32, 32, 64, 64], [128] * 6, [256, 256]), 1):
        for i, width in enumerate(widths, 1 if stage == 1 else 0):
            name = f"body.stage{stage}.{i}"
            rows += conv(f"{name}.0", dim, 1) + norm(f"{name}.1", dim)
            rows += conv(f"{name}.3", width, dim, 1) + norm(f"{name}.4", width)
            dim = width
    return retina_rows(rows, (64, 128, 256), 64)


def resnet_rows():
    rows, dim = conv("body.conv1", 64, 3, 7) + norm("body.bn1", 64), 64
    for layer, depth in enumerate((3, 4, 6, 3), 1):
        inner = 32 * 2**layer
        for i in range(depth):
            name = f"body.layer{layer}.{i}"
            rows += conv(f"{name}.conv1", inner, dim, 1) + norm(f"{name}.bn1", inner)
            rows += conv(f"{name}.conv2", inner, inner) + norm(f"{name}.bn2", inner)
            rows += conv(f"{name}.conv3", 4 * inner, inner, 1) + norm(f"{name}.bn3", 4 * inner)
            rows += [] if i else pair(f"{name}.downsample", 4 * inner, dim, 1)
            dim = 4 * inner
    return retina_rows(rows, (512, 1024, 2048), 256)


def arcface_rows(depths):
    rows, dim = conv("conv1", 64, 3) + norm("bn1", 64) + [("prelu.weight", (64,))], 64
    for layer, depth in enumerate(depths, 1):
        width = 32 * 2**layer
        for i in range(depth):
            name = f"layer{layer}.{i}"
            rows += norm(f"{name}.bn1", dim) + conv(f"{name}.conv1", width, dim) + norm(f"{name}.bn2", width)
            rows += [(f"{name}.prelu.weight", (width,))]
            rows += conv(f"{name}.conv2", width, width) + norm(f"{name}.bn3", width)
            rows += [] if i else pair(f"{name}.downsample", width, dim, 1)
            dim = width
    rows += norm("bn2", 512) + [("fc.weight", (512, 25088)), ("fc.bias", (512,))] + norm("features", 512)
    return dict(rows)


def pose_rows():
    rows, dim, number = conv("layer0.rbr_reparam", 64, 3, bias=True), 64, 0
    for layer, (depth, width) in enumerate(((4, 128), (6, 256), (16, 512), (1, 2048)), 1):
        for i in range(depth):
            number += 1
            rows += conv(f"layer{layer}.{i}.rbr_reparam", width, dim // (1 + (number % 2 == 0)), bias=True)
            dim = width
    return dict(rows + [("linear_reg.weight", (6, 2048)), ("linear_reg.bias", (6,))])


RELEASES = {"mobilenet0.25": (RetinaFace, mobile_rows, 300), "ResNet-50": (RetinaFace, resnet_rows, 456),
            "IResNet-50": (ArcFace, lambda: arcface_rows((3, 4, 14, 3)), 475),
            "IResNet-100": (ArcFace, lambda: arcface_rows((3, 13, 30, 3)), 925),
            "RepVGG-B1g2": (SixDRepNet, pose_rows, 58)}


@pytest.mark.parametrize("release", RELEASES)
def test_names_and_shapes_are_the_released_ones(release):
    kind, rows, number = RELEASES[release]
    rows = rows()
    with torch.device("meta"):
        network = kind.from_shapes(rows)
    assert {name: tuple(t.shape) for name, t in network.state_dict().items()} == rows
    assert len(rows) == number  # as many as in the originals


def test_depths_are_read_from_the_shapes():
    for depths in ((3, 4, 14, 3), (3, 13, 30, 3)):
        with torch.device("meta"):
            network = ArcFace.from_shapes(arcface_rows(depths))
        assert tuple(len(getattr(network, f"layer{i}")) for i in (1, 2, 3, 4)) == depths


# What the original modules (facexlib 0.3.0, arcface_torch, sixdrepnet 0.1.6) gave for randomise(seed 0) and
# the picture below: a few numbers of each output.
PINNED = {
    "mobilenet0.25": [[0.708222, 0.457262, 0.876743, 0.577382], [0.408515, 0.0104472, -0.322987, -0.00643848],
                      [0.403412, 0.484362, 0.825194, 0.0825371]],
    "ResNet-50": [[0.503731, 1, 0, 1], [673.967, 204.362, 949.865, -1461.31],
                  [790.902, 286.661, -1108.85, -3.27631]],
    "IResNet-50": [[2.82522e06, -6.37885e06, 386961, 3.74596e06]],
    "RepVGG-B1g2": [[0.505607, 0.763832, 0.534001, -0.362498]],
}


def digest(output):
    """Its mean size, and three of its numbers."""
    flat = output.flatten()
    return [flat.abs().mean().item(), *flat[:: len(flat) // 2 - 1][:3].tolist()]


@pytest.mark.parametrize("release", PINNED)
def test_outputs_are_those_of_the_originals(release):
    kind, rows, _ = RELEASES[release]
    network = kind.from_shapes(rows())
    torch.manual_seed(0)  # to make a network has drawn numbers
    randomise(network)
    side = {ArcFace: 112, SixDRepNet: 64, RetinaFace: 75}[kind]
    with torch.no_grad():
        outputs = network((torch.arange(3 * side * side) * 0.37).sin().reshape(1, 3, side, side))
    got = [digest(output) for output in (outputs if kind is RetinaFace else [outputs])]
    torch.testing.assert_close(torch.tensor(got), torch.tensor(PINNED[release]), rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ files
@pytest.mark.parametrize("kind", KINDS)
def test_files_load_with_and_without_prefix_and_counters(kind, tmp_path):
    network, x = small(kind), torch.randn(2, 3, 64, 64)
    if kind == "arcface":
        x = torch.randn(2, 3, 112, 112)
    state = network.state_dict()
    variants = {"plain.pth": state, "prefix.pth": {f"module.{k}": v for k, v in state.items()},
                "bare.pth": {k: v for k, v in state.items() if "num_batches" not in k},
                "half.pth": {k: v.double() if v.is_floating_point() else v for k, v in state.items()}}
    for name, tensors in variants.items():
        torch.save(tensors, tmp_path / name)
    save_file({f"module.{k}": v for k, v in state.items()}, tmp_path / "other.safetensors")
    with torch.no_grad():
        expected = network(x)
        for name in (*variants, "other.safetensors"):
            got = load_released(KINDS[kind], tmp_path / name, "cpu")
            assert not got.training and not any(p.requires_grad for p in got.parameters())
            torch.testing.assert_close(got(x), expected, rtol=0, atol=0)


def one_line(call):
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_do_not_fit_give_one_line(kind, tmp_path):
    state, path = small(kind).state_dict(), tmp_path / "weights.pth"
    first, last = list(state)[0], [name for name in state if "num_batches" not in name][-1]
    damaged = {
        "missing": {k: v for k, v in state.items() if k != last},
        "unknown": state | {"more": torch.zeros(1)},
        "mis-shaped": state | {last: torch.zeros(3, 3)},
        f"holds no {KINDS[kind].__name__}": {
            k: v for k, v in state.items() if k != first and "output1" not in k},
        "expected": state | {last: torch.zeros(state[last].shape, dtype=torch.long)},
        "": {"module.": torch.zeros(2)},
    }
    for said, tensors in damaged.items():
        torch.save(tensors, path)
        line = one_line(lambda: load_released(KINDS[kind], path, "cpu"))
        assert said in line and str(path) in line, line
    for data in (b"", b"<html>", b"not weights"):
        path.write_bytes(data)
        assert str(path) in one_line(lambda: load_released(KINDS[kind], path, "cpu"))
    for other in KINDS:
        if KINDS[other] is not KINDS[kind]:
            torch.save(small(other).state_dict(), path)
            assert "holds no" in one_line(lambda: load_released(KINDS[kind], path, "cpu"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_name_their_file(kind, value, tmp_path):
    """Every face was lost: "no clip is left", and not which file."""
    state = small(kind).state_dict()
    name = [name for name, tensor in state.items() if tensor.is_floating_point()][-1]
    state[name] = state[name].clone().fill_(value)
    torch.save(state, tmp_path / "weights.pth")
    line = one_line(lambda: load_released(KINDS[kind], tmp_path / "weights.pth", "cpu"))
    assert f"{tmp_path}/weights.pth" in line and f"{name!r} is not finite" in line


def test_of_a_crowd_the_largest_faces_count():
    class Crowd:
        embed = staticmethod(lambda crops: None)
        pose = staticmethod(lambda crops, landmarks: torch.zeros(len(crops), 3))

        def detect(self, images):
            boxes = torch.tensor([[k, 0.0, 2 * k + 5, 9] for k in range(60)])
            return [[Detection(box, 0.9, torch.rand(5, 2) * 9) for box in boxes]]
    faces = find_faces(Crowd(), np.zeros((64, 128, 3), np.uint8), 0, 0.5)
    assert {face.box[0].item() for face in faces} == set(range(60 - MOST_FACES, 60))


def test_what_is_missing_is_said_once(tmp_path, capsys):
    assert "holds no RetinaFace (detection_*_Final.*)" in one_line(lambda: Faces(tmp_path / "nowhere"))
    backend = Faces(folder_of(tmp_path / "detector", "mobile"))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "holds no ArcFace" in said[0] and "an identity is one track" in said[0]
    assert "holds no SixDRepNet" in said[1] and "five landmarks" in said[1]
    assert backend.embed(torch.zeros(1, 3, 112, 112)) is None and not capsys.readouterr().err
    Faces(folder_of(tmp_path / "all", "mobile", "arcface", "pose"))
    assert not capsys.readouterr().err
    both = Faces(folder_of(tmp_path / "all", "resnet"))
    assert isinstance(both.detector.body, ResNet)


# -------------------------------------------------------------------------------------------------- detection
def brute_nms(boxes, scores, limit):
    """Pixel by pixel: a box is the set of whole pixels from its first to its last."""
    pixels = [{(x, y) for x in range(a, c + 1) for y in range(b, d + 1)} for a, b, c,
              d in boxes.long().tolist()]
    keep = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(len(pixels[i] & pixels[j]) <= limit * len(pixels[i] | pixels[j]) for j in keep):
            keep.append(i)
    return keep


def test_nms_is_the_brute_force_one():
    for n in (0, 1, 2, 40):
        corner = torch.randint(0, 12, (n, 2))
        boxes = torch.cat((corner, corner + torch.randint(0, 12, (n, 2))), dim=1).float()
        scores = torch.rand(n)
        for limit in (0.2, 0.4, 0.7):
            assert nms(boxes, scores, limit) == brute_nms(boxes, scores, limit)
    two = torch.tensor([[0.0, 0, 9, 9], [0, 0, 3, 9]])  # 40 of 100 pixels: not above 0.4, so both stay
    assert iou(two[0], two[1:]).item() == pytest.approx(0.4) and nms(two, torch.tensor([0.5, 0.9])) == [1, 0]
    assert nms(torch.full((3, 4), math.nan), torch.ones(3)) == [0]


@pytest.mark.parametrize("size", [(1, 1), (7, 33), (64, 64), (45, 61), (100, 201)])
def test_there_is_one_prior_an_output(size):
    expected = [
        [(j + 0.5) * step, (i + 0.5) * step, side]
        for step, sides in ((8, (16, 32)), (16, (64, 128)), (32, (256, 512)))
        for i in range(-(-size[0] // step))
        for j in range(-(-size[1] // step))
        for side in sides
    ]
    assert priors(*size).tolist() == expected
    for kind in ("mobile", "resnet"):
        with torch.no_grad():
            scores, boxes, landmarks = small(kind)(torch.randn(2, 3, *size))
        n = len(expected)
        assert scores.shape == (2, n) and boxes.shape == (2, n, 4) and landmarks.shape == (2, n, 10)
        assert (0 <= scores).all() and (scores <= 1).all()


def test_decode_turns_encode_back():
    prior = priors(64, 96)
    middle, size = prior[:, :2] + 5 * torch.randn(len(prior), 2), 10 + 50 * torch.rand(len(prior), 2)
    points = middle[:, None] + 9 * torch.randn(len(prior), 5, 2)
    side = prior[:, 2:]
    box = torch.cat(((middle - prior[:, :2]) / side / 0.1, (size / side).log() / 0.2), dim=1)
    boxes, landmarks = decode(prior, box, ((points - prior[:, None, :2]) / side[:, None] / 0.1).flatten(1))
    torch.testing.assert_close(boxes, torch.cat((middle - size / 2, middle + size / 2), dim=1), rtol=1e-4,
                               atol=1e-3)
    torch.testing.assert_close(landmarks, points, rtol=1e-4, atol=1e-3)


class Planted(nn.Module):
    """A detector that gives these priors these scores in every picture, and moves none of them."""

    def __init__(self, scores):
        super().__init__()
        self.scores, self.seen = scores, []

    def forward(self, image):
        self.seen.append(image)
        n = len(priors(*image.shape[2:]))
        scores, boxes, landmarks = (torch.zeros(len(image), n, *values) for values in ((), (4,), (10,)))
        for at, score in self.scores.items():
            scores[:, at] = score
        return scores, boxes, landmarks


def backend(tmp_path, *kinds):
    return Faces(folder_of(tmp_path, "mobile", *kinds))


def test_detect_reads_bgr_less_its_mean_and_filters(tmp_path):
    net = backend(tmp_path)
    net.detector = Planted({0: 0.6, 7: 0.9, 40: 0.5, 1: 0.8})
    image = torch.rand(2, 3, 64, 64) * 2 - 1
    found = net.detect(image)
    torch.testing.assert_close(net.detector.seen[0][:, 0] + 104, (image[:, 2] + 1) * 127.5, rtol=1e-5,
                               atol=1e-4)
    torch.testing.assert_close(net.detector.seen[0][:, 2] + 123, (image[:, 0] + 1) * 127.5, rtol=1e-5,
                               atol=1e-4)
    prior = priors(64, 64)
    for faces_of in found:  # prior 0 and 1 share a centre, 16 and 32 wide: IoU is 0.27
        assert [round(f.score, 3) for f in faces_of] == [0.9, 0.8, 0.6]
        for face, at in zip(faces_of, (7, 1, 0), strict=True):
            x, y, side = prior[at].tolist()
            assert face.box.tolist() == [x - side / 2, y - side / 2, x + side / 2, y + side / 2]
            assert face.landmarks.tolist() == [[x, y]] * 5
    assert [len(f) for f in net.detect(image, least=0.7)] == [2, 2] and net.detect(image[:0]) == []


def test_large_pictures_are_shrunk_and_boxes_grow_back(tmp_path):
    net = backend(tmp_path)
    net.longest, net.detector = 64, Planted({3: 0.9})
    face = net.detect(torch.zeros(1, 3, 64, 128))[0][0]
    assert net.detector.seen[0].shape == (1, 3, 32, 64)
    x, y, side = (2 * priors(32, 64)[3]).tolist()
    assert face.box.tolist() == [x - side / 2, y - side / 2, x + side / 2, y + side / 2]
    assert face.landmarks.tolist() == [[x, y]] * 5


def test_odd_pictures_are_shrunk_in_each_direction_by_its_own_factor(tmp_path):
    """101 x 203 becomes 32 x 64: by 3.156 in height and 3.172 in width."""
    net = backend(tmp_path)
    net.longest, net.detector = 64, Planted({11: 0.9})
    for size, small, at in (((101, 203), (32, 64), 0), ((203, 101), (64, 32), 1)):
        (face,) = net.detect(torch.zeros(1, 3, *size))[0]
        assert net.detector.seen[-1].shape[2:] == small
        x, y, side = priors(*small)[11].tolist()
        factor = torch.tensor([size[1] / small[1], size[0] / small[0]])
        corners = torch.tensor([[x - side / 2, y - side / 2], [x + side / 2, y + side / 2]]) * factor
        torch.testing.assert_close(face.box, corners.flatten())
        torch.testing.assert_close(face.landmarks, (torch.tensor([x, y]) * factor).expand(5, 2))


def test_batches_equal_singles(tmp_path):
    net = backend(tmp_path, "arcface", "pose")
    for head in (*net.detector.ClassHead, *net.detector.BboxHead, *net.detector.LandmarkHead):
        head["conv1x1"].weight.mul_(0.02)
    images = torch.rand(5, 3, 50, 70) * 2 - 1
    crops, heads = torch.rand(5, 3, 112, 112) * 2 - 1, torch.rand(5, 3, 90, 90) * 2 - 1
    results = []
    for batch in (8, 2):
        net.batch = batch
        found = net.detect(images, least=0.4)
        results.append((found, net.embed(crops), net.pose(heads, None)))
    results.append(
        (sum((net.detect(x[None], least=0.4) for x in images), []),
         torch.cat([net.embed(x[None]) for x in crops]), torch.cat([net.pose(x[None], None) for x in heads]))
    )
    assert sum(map(len, results[0][0])) > 5
    for found, vectors, angles in results[1:]:
        torch.testing.assert_close(vectors, results[0][1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(angles, results[0][2], rtol=1e-4, atol=1e-3)
        assert [len(f) for f in found] == [len(f) for f in results[0][0]]
        for a, b in zip(sum(found, []), sum(results[0][0], []), strict=True):
            torch.testing.assert_close(a.box, b.box, rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(a.landmarks, b.landmarks, rtol=1e-4, atol=1e-3)
    assert torch.allclose(results[0][1].norm(dim=1), torch.ones(5)) and results[0][1].shape == (5, 16)
    assert net.embed(crops[:0]).shape == (0, 16) and net.pose(heads[:0], None).shape == (0, 3)


# -------------------------------------------------------------------------------------------------- alignment
def umeyama(source, target):
    """The textbook's way: SVD of the covariance, the last sign turned where it would mirror -> [2, 3]."""
    a, b = source - source.mean(0), target - target.mean(0)
    U, S, V = torch.linalg.svd(b.T @ a)
    sign = torch.tensor([1.0, torch.sign(torch.det(U) * torch.det(V)).item()], dtype=S.dtype)
    R, scale = U @ torch.diag(sign) @ V, (S * sign).sum() / a.square().sum()
    return torch.cat((scale * R, (target.mean(0) - scale * R @ source.mean(0))[:, None]), dim=1)


def as_matrix(factor, shift):
    f = factor[0]
    return torch.stack(
        (torch.stack((f.real, -f.imag, shift[0].real)), torch.stack((f.imag, f.real, shift[0].imag)))
    )


def test_similarity_is_umeyamas_and_never_mirrors():
    for _ in range(50):
        a, b = torch.randn(2, 5, 2, dtype=torch.float64)
        got = as_matrix(*similarity(a[None], b[None]))
        torch.testing.assert_close(got, umeyama(a, b))
        mirrored = as_matrix(*similarity(a[None], (a * torch.tensor([-1.0, 1]))[None]))
        assert torch.det(mirrored[:, :2]) >= 0
    turn, shift = (torch.polar(torch.tensor([1.7]), torch.tensor([2.1])),
                   torch.complex(*torch.tensor([[3.0], [-4.0]])))
    moved = torch.view_as_real(torch.view_as_complex(a.float()) * turn + shift)
    got = similarity(a[None].float(), moved[None])
    torch.testing.assert_close(got[0], turn)
    torch.testing.assert_close(got[1], shift)
    same = torch.ones(1, 5, 2)
    assert torch.view_as_real(similarity(same, same)[0]).isfinite().all()


def coordinates(height, width):
    """A picture that says where it is: red is x, green is y, in hundreds of pixels."""
    y, x = torch.meshgrid(torch.arange(height) / 100, torch.arange(width) / 100, indexing="ij")
    return torch.stack((x, y, torch.zeros_like(x)))


def test_align_brings_landmarks_to_their_places():
    target, image = torch.tensor(ALIGNED), coordinates(230, 250)
    for angle, scale in ((0.0, 1.0), (0.5, 1.6), (-2.5, 1.2), (3.1, 0.9)):
        factor = torch.polar(torch.tensor(scale), torch.tensor(angle))
        points = torch.view_as_real(torch.view_as_complex(target - 56) * factor) + torch.tensor(
            [120.0, 110.0]
        )
        crop = align(image, points[None])
        assert crop.shape == (1, 3, 112, 112)
        at = F.grid_sample(crop, 2 * target[None, None] / 111 - 1, align_corners=True)[0, :2, 0].T * 100
        torch.testing.assert_close(at, points, rtol=0, atol=1e-2)  # hundredths of a pixel
        both = align(image, torch.stack((points, points + 3)))
        torch.testing.assert_close(both[:1], crop, rtol=0, atol=1e-3)
    torch.testing.assert_close(align(image, target[None])[0], image[:, :112, :112], rtol=0, atol=1e-4)
    assert (align(image, target[None] - 500) == -1).all()  # black beyond the picture
    assert align(image, target[None][:0]).shape == (0, 3, 112, 112)


def warp_affine(image, matrix, side):
    """As cv2.warpAffine samples: crop pixel (i, j) is the picture, bilinear, where the inverse of the matrix
    [2, 3] puts it; black beyond the picture."""
    turn, shift = np.float64(matrix[:, :2]), np.float64(matrix[:, 2])
    j, i = np.meshgrid(np.arange(side), np.arange(side))
    x, y = np.linalg.inv(turn) @ (np.stack((j.ravel(), i.ravel())) - shift[:, None])
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    crop = np.zeros((3, side * side))
    for dx, dy in itertools.product((0, 1), (0, 1)):
        column, row = left + dx, top + dy
        inside = (0 <= column) & (column < image.shape[2]) & (0 <= row) & (row < image.shape[1])
        weight = (1 - abs(x - column)) * (1 - abs(y - row)) * inside
        crop += weight * (image.numpy()[:, row.clip(0, image.shape[1] - 1),
                                        column.clip(0, image.shape[2] - 1)] + 1)
    return torch.from_numpy(crop - 1).float().view(3, side, side)


@pytest.mark.parametrize("scale, at, noise",
                         [(50.0, (150.0, 120.0), 0), (70.0, (90.0, 60.0), 3), (21.0, (200.0, 40.0), 1)])
def test_align_is_the_norm_crop_of_turned_heads(scale, at, noise):
    """insightface's norm_crop: Umeyama's fit of the landmarks to the template, then warpAffine. From the
    front the fit of the template to the landmarks would be the same crop; at 60 degrees its side is 0.84
    of the right one."""
    angles = grid((-80, -45, 0, 20, 60, 80), (-25, 0, 30), (-20, 0, 35))
    points = project(angles, scale, at) + noise * torch.randn(len(angles), 5, 2)
    y, x = torch.meshgrid(torch.arange(187.0), torch.arange(251.0), indexing="ij")
    image = torch.stack(((x / 9).sin(), (y / 7).cos(), ((x + y) / 11).sin()))
    for side in (112, 80):
        crops, target = align(image, points, side), torch.tensor(ALIGNED).double() * side / 112
        for crop, five in zip(crops, points.double(), strict=True):
            torch.testing.assert_close(crop, warp_affine(image, umeyama(five, target), side), rtol=0,
                                       atol=2e-3)


@pytest.mark.parametrize("apart", [0, 1e-30, 1e-6])
def test_landmarks_on_one_point_still_give_a_crop(apart):
    image = coordinates(230, 250)
    points = torch.full((2, 5, 2), 100.0) + apart * torch.randn(2, 5, 2)
    points[1] -= 9000  # far beyond the picture
    crops = align(image, points)
    assert crops.isfinite().all() and (crops[1] == -1).all()
    if not apart:  # where nothing says how large the face is, a pixel of the crop is one of the picture
        middle = torch.tensor(ALIGNED).mean(0)
        at = F.grid_sample(crops[:1], 2 * middle.view(1, 1, 1, 2) / 111 - 1, align_corners=True)[0, :2, 0, 0]
        torch.testing.assert_close(at * 100, points[0, 0], rtol=0, atol=1e-2)
        assert (crops[0, 0, 50, 60] - crops[0, 0, 50, 50]).item() == pytest.approx(0.1, abs=1e-4)


@pytest.mark.parametrize("noise", [0, 12])
def test_align_of_the_mirrored_picture_is_the_mirrored_crop(noise):
    """With noise the landmarks are no turned and scaled template, as those of a turned head."""
    target = torch.tensor(ALIGNED)
    even = (target + (torch.tensor([111.0, 0]) + target * torch.tensor([-1.0, 1]))[[1, 0, 2, 4, 3]]) / 2
    image, points = torch.rand(3, 150, 140) * 2 - 1, even * 1.1 + torch.tensor([5.0, 9.0])
    points += noise * torch.randn(5, 2)
    flipped = (points * torch.tensor([-1.0, 1]) + torch.tensor([139.0, 0]))[[1, 0, 2, 4, 3]]
    before, faces.ALIGNED = faces.ALIGNED, tuple(map(tuple, even.tolist()))
    try:
        a, b = align(image, points[None]), align(image.flip(2), flipped[None])
    finally:
        faces.ALIGNED = before
    torch.testing.assert_close(a.flip(3), b, rtol=0, atol=1e-3)


def test_crops_are_squares_around_boxes():
    image = coordinates(40, 60)
    box = torch.tensor([[20.0, 10, 30, 20], [-50, -50, 5, 5], [0, 0, 600, 400], [7, 7, 7, 7]])
    crops = crop_faces(image, box, margin=0.5, side=20)
    assert crops.shape == (4, 3, 20, 20) and crops.isfinite().all()
    assert torch.equal(crops[0], image[:, 5:25, 15:35])
    assert torch.equal(crop_faces(image, box[:1], margin=0, side=10)[0], image[:, 10:20, 20:30])
    assert crop_faces(image, box[:0]).shape == (0, 3, 224, 224)


@pytest.mark.parametrize(
    "box", [(20, 10, 30, 30), (20, 10, 44, 16), (3, 4, 9, 34), (50, 1, 58, 5), (31, 17, 33, 19)]
)
def test_a_square_is_as_long_as_the_longer_side_of_its_box(box):
    """Tall and wide boxes, near every edge, whose pixels go on beyond it."""
    image, (left, top, right, bottom) = torch.rand(3, 40, 60), box
    side = 2 * max(right - left, bottom - top)
    x, y = (left + right - side) // 2 + 99, (top + bottom - side) // 2 + 99
    padded = np.pad(image.numpy(), ((0, 0), (99, 99), (99, 99)), mode="edge")
    (crop,) = crop_faces(image, torch.tensor([box]).float(), margin=0.5, side=side)
    assert torch.equal(crop, torch.from_numpy(padded[:, y : y + side, x : x + side]))


# ------------------------------------------------------------------------------------------------------- pose
def turns(yaw, pitch, roll):
    return toy.rotation(*(torch.as_tensor(a, dtype=torch.float32) for a in (yaw, pitch, roll)))


def grid(yaws, pitches=(-30, 0, 25), rolls=(-40, 0, 15)):
    return torch.cartesian_prod(*(torch.tensor(a, dtype=torch.float32) for a in (yaws, pitches, rolls)))


def test_angles_are_those_of_the_toy_world():
    angles = grid((-179, -120, -90, -35, 0, 10, 85, 150), (-80, -30, 0, 60), (-150, -20, 0, 70))
    torch.testing.assert_close(angles_of(turns(*angles.T)), angles, rtol=0, atol=2e-3)
    # where the nose goes: yaw > 0 to the picture's right, pitch > 0 up
    assert (turns([30.0], [0.0], [0.0])[0, :, 2] > torch.tensor([0.4, -1e-6, 0.8])).all()
    assert (turns([0.0], [30.0], [0.0])[0, :, 2] > torch.tensor([-1e-6, 0.4, 0.8])).all()


def six_d(pitch, yaw, roll):
    """What 6DRepNet learns for 300W-LP's angles, Rz Ry Rx. There yaw > 0 looks to the picture's LEFT."""
    x, y, z = (torch.tensor(math.radians(a)) for a in (pitch, yaw, roll))
    zero, one = torch.tensor(0.0), torch.tensor(1.0)

    def matrix(*rows):
        return torch.stack(rows).reshape(3, 3)

    return (
        matrix(z.cos(), -z.sin(), zero, z.sin(), z.cos(), zero, zero, zero, one)
        @ matrix(y.cos(), zero, y.sin(), zero, one, zero, -y.sin(), zero, y.cos())
        @ matrix(one, zero, zero, zero, x.cos(), -x.sin(), zero, x.sin(), x.cos())
    )


def planted_pose(matrix):
    """A SixDRepNet whose output is this matrix whatever it sees."""
    network = small("pose")
    network.linear_reg.weight.data.zero_()
    scale = torch.tensor([3.0, 3, 3, 0.5, 0.5, 0.5])  # lengths do not count
    network.linear_reg.bias.data.copy_(torch.cat((matrix[:, 0], matrix[:, 1])) * scale)
    return network


@pytest.mark.parametrize("pitch, yaw, roll",
                         [(0, 40, 0), (0, -70, 10), (20, 0, 0), (-15, 0, 30), (10, -35, 20)])
def test_6drepnets_signs_are_mapped(pitch, yaw, roll, tmp_path):
    net = backend(tmp_path, "pose")
    net.poser = planted_pose(six_d(pitch, yaw, roll))
    got = net.pose(torch.zeros(2, 3, 50, 50), None)
    # 300W-LP: the nose of a head of these angles points here in the picture, y down
    x, down = -math.sin(math.radians(yaw)), -math.cos(math.radians(yaw)) * math.sin(math.radians(pitch))
    nose = turns(*got[:1].T)[0, :, 2]
    assert nose[0].item() == pytest.approx(x, abs=1e-5) and nose[1].item() == pytest.approx(-down, abs=1e-5)
    if not pitch:
        torch.testing.assert_close(got, torch.tensor([[-yaw, 0.0, -roll]]).expand(2, 3), rtol=0, atol=1e-3)
    if not yaw and not roll:
        torch.testing.assert_close(got, torch.tensor([[0.0, pitch, 0.0]]).expand(2, 3), rtol=0, atol=1e-3)


def test_a_mirrored_head_has_mirrored_angles():
    mirror = torch.diag(torch.tensor([-1.0, 1, 1]))
    rotation = turns(*grid((-170, -60, 0, 20, 90)).T)
    expected = angles_of(rotation) * torch.tensor([-1.0, 1, -1])
    torch.testing.assert_close(angles_of(mirror @ rotation @ mirror), expected, rtol=0, atol=2e-3)


def test_yaw_of_the_mirrored_picture_is_its_negative():
    """Exact for weights that know no side: channels in mirrored pairs, outputs even or odd in them."""
    network = small("pose").requires_grad_(False)
    for name, w in network.named_parameters():
        if name.startswith("linear_reg"):
            continue
        half = len(w) // 2
        if w.ndim == 1:
            w[half:] = w[:half]
        elif "layer0" in name or w.shape[1] < network.get_submodule(name.removesuffix(".weight")).in_channels:
            w[half:] = w[:half].flip(3)  # the picture has no pairs; two groups are each other's mirror
        else:
            w[half:] = w[:half].roll(w.shape[1] // 2, 1).flip(3)
    odd = torch.tensor([False, True, True, True, False, False])  # R00 R10 R20 R01 R11 R21
    head = network.linear_reg
    half = head.in_features // 2
    head.weight[:, half:] = head.weight[:, :half] * torch.where(odd, -1, 1)[:, None]
    head.bias[odd] = 0
    image = 2 * torch.rand(6, 3, 97, 97) - 1  # odd sizes, so that strides have no side either
    a, b = angles_of(network(image)), angles_of(network(image.flip(3)))
    assert a[:, 0].abs().max() > 1
    torch.testing.assert_close(b, a * torch.tensor([-1.0, 1, -1]), rtol=0, atol=1e-2)


def project(angles, scale=50.0, at=(200.0, 120.0)):
    """The mean face turned, in pixels, y down."""
    points = (torch.tensor(MEAN_FACE) @ turns(*angles.T).mT)[..., :2]
    return points * torch.tensor([scale, -scale]) + torch.tensor(at)


def test_landmarks_give_yaw_pitch_and_roll_of_the_mean_face():
    angles = grid(range(-60, 61, 10))
    got = angles_of(rotation_of(project(angles)))
    assert (got - angles).abs().max() < 0.1  # 1 degree is asked for
    mirrored = (project(angles) * torch.tensor([-1.0, 1]))[:, [1, 0, 2, 4, 3]]
    torch.testing.assert_close(angles_of(rotation_of(mirrored)), got * torch.tensor([-1.0, 1, -1]), rtol=0,
                               atol=0.05)


def test_landmarks_bear_noise():
    angles = grid(range(-60, 61, 5))
    got = angles_of(rotation_of(project(angles) + torch.randn(len(angles), 5, 2)))  # 2 % of the eye distance
    assert (got - angles)[:, 0].std() < 3 and (got - angles)[:, 0].mean().abs() < 1


def test_without_6drepnet_yaw_comes_from_landmarks(tmp_path):
    net, angles = backend(tmp_path), grid((-40, 20))
    points = project(angles)
    points[3] = torch.nan
    got = net.pose(torch.zeros(len(angles), 3, 60, 60), points)
    assert got[3].isnan().all()
    seen = [i for i in range(len(angles)) if i != 3]
    torch.testing.assert_close(got[seen], angles[seen], rtol=0, atol=0.1)
    assert net.pose(torch.zeros(0, 3, 60, 60), torch.zeros(0, 5, 2)).shape == (0, 3)


# ---------------------------------------------------------------------------------------------- real pictures
def open_picture(path):
    image = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None]
    return image / 127.5 - 1


REAL = {"scikit-image==0.26.0": "skimage/data/astronaut.png",
        "matplotlib==3.11.2": "matplotlib/mpl-data/sample_data/grace_hopper.jpg"}


@pytest.mark.skipif("DOWNLOADS" not in os.environ, reason="downloads; DOWNLOADS=1 runs it")
def test_mtcnn_is_a_second_backend_on_real_faces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    net = fetch_mtcnn(folder)
    assert net.detect(torch.zeros(2, 3, 100, 80)) == [[], []]
    for package, name in REAL.items():
        image = open_picture(fetch(folder, package, name)[0])
        found, mirrored = net.detect(torch.cat((image, image.flip(3))))
        print(package, tuple(image.shape), found)
        assert len(found) == len(mirrored) == 1  # exactly one person is in each
        for face in (found[0], mirrored[0]):
            left, right, nose, mouth_left, mouth_right = face.landmarks
            assert left[0] < nose[0] < right[0] and mouth_left[0] < mouth_right[0]  # the picture's left first
            assert max(left[1], right[1]) < nose[1] < min(mouth_left[1], mouth_right[1])
            assert (face.landmarks > face.box[:2]).all() and (face.landmarks < face.box[2:]).all()
        points = torch.stack((found[0].landmarks, mirrored[0].landmarks))
        yaw, pitch, roll = net.pose(None, points).T.tolist()
        print("yaw", yaw, "pitch", pitch, "roll", roll)
        assert abs(yaw[0]) < 30 and yaw[1] == pytest.approx(-yaw[0], abs=6)
        face = align(image[0], points[:1])
        torch.testing.assert_close(net.detect(face)[0][0].landmarks, torch.tensor(ALIGNED), rtol=0, atol=8)


# ------------------------------------------------------------------------------------------ aesthetic quality
def small_clip():
    """A random CLIP of transformers, both towers."""
    from transformers import CLIPConfig, CLIPModel

    tower = dict(hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=tower, vision_config=tower | dict(image_size=56, patch_size=14),
                                 projection_dim=24))
    for parameter in model.parameters():  # as released ones, nowhere zero or one
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def save_aesthetic(folder):
    """Files of a small random CLIP and head as users have them -> the model of transformers, the head."""
    model = small_clip()
    (folder / "clip-vit-large-patch14").mkdir(parents=True)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "clip-vit-large-patch14" / "model.safetensors")
    dims = (24, 20, 16, 12, 8, 1)
    layers = [torch.nn.Linear(a, b) for a, b in zip(dims, dims[1:])]
    head = torch.nn.Sequential(*itertools.chain(*((layer, torch.nn.Dropout()) for layer in layers[:3])),
                               *layers[3:]).eval()
    state = {f"layers.{name}": tensor for name, tensor in head.state_dict().items()}
    torch.save(state, folder / "sac+logos+ava1-l14-linearMSE.pth")
    return model, head


def test_clip_is_transformers_clip(tmp_path):
    model, _ = save_aesthetic(tmp_path)
    file = tmp_path / "clip-vit-large-patch14" / "model.safetensors"
    ours = faces.load_released(faces.CLIP, file, "cpu")
    crop = torch.rand(3, 3, 56, 56) * 2 - 1
    mean, std = torch.tensor(faces.CLIP_RGB)[..., None, None]
    with torch.no_grad():
        vision = model.vision_model(((crop + 1) / 2 - mean) / std)
        expected = model.visual_projection(vision.pooler_output)
        torch.testing.assert_close(ours(crop), expected, rtol=1e-4, atol=1e-4)
    assert ours(crop).std() > 0.1


@pytest.mark.parametrize("size, small, window", [
    ((60, 100), (56, 93), (slice(None), slice(18, 74))), ((100, 60), (93, 56), (slice(18, 74), slice(None)))])
def test_the_aesthetic_score_is_clips_unit_vector_through_five_layers(size, small, window, tmp_path):
    model, head = save_aesthetic(tmp_path)
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in size), indexing="ij")
    image = torch.stack((x, y, -x))  # so that another window has another score, by 0.002 or more
    small = np.asarray(Image.fromarray(((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).resize(
        small[::-1], Image.Resampling.BICUBIC))[window]
    crop = torch.from_numpy(small / 127.5 - 1).float().permute(2, 0, 1)[None]
    mean, std = torch.tensor(faces.CLIP_RGB)[..., None, None]
    with torch.no_grad():
        vision = model.vision_model(((crop + 1) / 2 - mean) / std)
        expected = head(F.normalize(model.visual_projection(vision.pooler_output), dim=1))
    found = faces.Aesthetic.load(tmp_path)(image)
    assert found == pytest.approx(expected.item(), abs=5e-4)


def test_without_either_file_there_is_no_aesthetic_score(tmp_path, capsys):
    save_aesthetic(tmp_path)
    (tmp_path / "sac+logos+ava1-l14-linearMSE.pth").rename(tmp_path / "kept")
    assert faces.Aesthetic.load(tmp_path) is None
    assert "holds no AestheticHead (*linearMSE.*): no aesthetic score" in capsys.readouterr().err
    (tmp_path / "kept").rename(tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    file = tmp_path / "clip-vit-large-patch14" / "model.safetensors"
    tensors = load_file(file)
    tensors["vision_model.extra"] = torch.zeros(1)
    save_file(tensors, file)
    with pytest.raises(UserError, match="1 unknown .*extra"):
        faces.Aesthetic.load(tmp_path)
    del tensors["vision_model.extra"], tensors["vision_model.post_layernorm.bias"]
    save_file(tensors, file)
    with pytest.raises(UserError, match="1 missing .*post_layernorm"):
        faces.Aesthetic.load(tmp_path)


def test_the_released_sizes_of_clip_and_its_head():
    with torch.device("meta"):
        network, head = faces.CLIP(), faces.AestheticHead()
    assert sum(p.numel() for p in network.parameters()) == 303_966_208  # ViT-L/14 and its projection
    assert network.side == 224 and head.layers["0"].weight.shape == (1024, 768)
