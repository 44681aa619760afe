"""What is seen of faces, by frozen networks whose weights the user brings. None of them is trained here.

Module trees carry the key names of the released files; depths and widths are read from the shapes.
  RetinaFace   boxes and five landmarks; mobilenet0.25 or ResNet-50
  ArcFace      a face as a unit vector; IResNet-50 or -100
  SixDRepNet   the head's rotation; RepVGG-B1g2 as deployed
  CLIP         a picture as a vector: the image tower of CLIP, for Aesthetic
  Faces        the first three from one folder: detect, embed and pose are all that curation and metrics
               see, so another detector is another object with these three
  Aesthetic    how well a picture looks, by people's votes; of no face at all

Pictures are RGB in -1..1, [B, 3, H, W]. Boxes and landmarks are in pixels, x to the right and y down.
Angles are in degrees: yaw > 0 looks to the picture's right edge, pitch > 0 looks up, roll > 0 tilts the head
counter-clockwise, as in toy.py.
"""
import functools
import itertools
import math
import sys
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from networks.weights import WeightFile, load_weights, read_weights
from support.script import UserError

# Five landmarks: eyes, nose tip, mouth corners, the picture's left first. In the 112 x 112 pixels of ArcFace:
ALIGNED = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))
# On a mean face, x right, y up, z to the viewer, in eye distances; published noses stand out by 0.43 to 0.6.
MEAN_FACE = ((-0.5, 0.0, 0.0), (0.5, 0.0, 0.0), (0.0, -0.56, 0.5), (-0.42, -1.08, 0.03), (0.42, -1.08, 0.03))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation of RGB in 0..1
CLIP_RGB = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # the same of CLIP
MOST_FACES = 32  # of a picture that are looked at: a crowd's others are too small to be anybody's reference
resize = functools.partial(F.interpolate, mode="bilinear", antialias=True)


# ---------------------------------------------------------------------------------------------------- loading
def load_released(kind, path, device):
    """A frozen network as wide and deep as the file holds it, in float32. Ignores DataParallel's `module.`
    before names, batch norms' counters and what its kind calls `unused`. UserError where anything does not
    fit."""
    file, counter = read_weights(path), "num_batches_tracked"
    prefix = "module." if all(name.startswith("module.") for name in file.shapes) else ""
    shapes = {name.removeprefix(prefix): shape for name, shape in file.shapes.items() if counter not in name}
    unused = getattr(kind, "unused", ())
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith(unused)}
    try:
        with torch.device("meta"):
            network = kind.from_shapes(shapes)
    except Exception as error:  # tensors of any names and shapes
        raise UserError(f"{path} holds no {kind.__name__}: {type(error).__name__} {str(error)[:60]!r} "
                        f"among its {len(shapes)} tensors") from None
    for module in network.modules():
        if hasattr(module, counter):
            setattr(module, counter, None)
    file = WeightFile(path, shapes, lambda name, get=file.get: get(prefix + name))
    return load_weights(network, file, torch.float32, device).requires_grad_(False).eval()


def depths_of(shapes, prefix=""):
    """How many blocks layer1 to layer4 have."""
    names = {tuple(name.removeprefix(prefix).split(".")[:2]) for name in shapes if name.startswith(prefix)}
    return [sum(layer == f"layer{number}" for layer, *_ in names) for number in range(1, 5)]


def layers(block, dim_in, dims, depths, strides=(2, 2, 2, 2)):
    """The four layers of a network: depth blocks, dim wide, of which the first has the stride."""
    for dim, depth, stride in zip(dims, depths, strides):
        yield nn.Sequential(*(block(dim if i else dim_in, dim, 1 if i else stride) for i in range(depth)))
        dim_in = dim


def conv_norm(dim_in, dim_out, kernel, stride=1, groups=1, leaky=None):
    """Convolution and batch norm, then a ReLU of that leak, if one is given."""
    conv = nn.Conv2d(dim_in, dim_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    relu = () if leaky is None else (nn.LeakyReLU(leaky, inplace=True),)
    return nn.Sequential(conv, nn.BatchNorm2d(dim_out), *relu)


# ------------------------------------------------------------------------------------------------- RetinaFace
class MobileNet(nn.Module):
    """MobileNet (Howard et al. 2017), width 8 for mobilenet0.25 -> maps at 1/8, 1/16 and 1/32 of the size."""
    blocks = (((1, 2, 1), (2, 4, 2), (4, 4, 1), (4, 8, 2), (8, 8, 1)),  # dim_in, dim_out in widths, stride
              ((8, 16, 2), *((16, 16, 1),) * 5), ((16, 32, 2), (32, 32, 1)))

    def __init__(self, width):
        super().__init__()
        self.dims = [8 * width, 16 * width, 32 * width]
        self.stage1, self.stage2, self.stage3 = (
            nn.Sequential(*(nn.Sequential(*conv_norm(a * width, a * width, 3, stride, a * width, leaky=0.1),
                                          *conv_norm(a * width, b * width, 1, leaky=0.1))
                            for a, b, stride in stage)) for stage in self.blocks)
        self.stage1.insert(0, conv_norm(3, width, 3, 2, leaky=0.1))

    def forward(self, x):
        fine = self.stage1(x)
        middle = self.stage2(fine)
        return fine, middle, self.stage3(middle)


class Bottleneck(nn.Module):
    """Key names of torchvision; the stride is conv2's."""

    def __init__(self, dim_in, dim_out, stride):
        super().__init__()
        dim = dim_out // 4
        self.conv1, self.bn1 = nn.Conv2d(dim_in, dim, 1, bias=False), nn.BatchNorm2d(dim)
        self.conv2, self.bn2 = nn.Conv2d(dim, dim, 3, stride, 1, bias=False), nn.BatchNorm2d(dim)
        self.conv3, self.bn3 = nn.Conv2d(dim, dim_out, 1, bias=False), nn.BatchNorm2d(dim_out)
        self.downsample = conv_norm(dim_in, dim_out, 1, stride) if (stride, dim_in) != (1, dim_out) else None

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """ResNet (He et al. 2016), for ResNet-50 width 64 and depths 3, 4, 6, 3 -> maps as MobileNet."""

    def __init__(self, width, depths):
        super().__init__()
        self.dims = [8 * width, 16 * width, 32 * width]
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        self.layer1, self.layer2, self.layer3, self.layer4 = layers(
            Bottleneck, width, (4 * width, *self.dims), depths, strides=(1, 2, 2, 2))

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        fine = self.layer2(self.layer1(x))
        middle = self.layer3(fine)
        return fine, middle, self.layer4(middle)


class SSH(nn.Module):
    """Context module (Najibi et al. 2017): 3x3, 5x5 and 7x7 windows out of 3x3 convolutions."""

    def __init__(self, dim, leaky):
        super().__init__()
        self.conv3X3 = conv_norm(dim, dim // 2, 3)
        self.conv5X5_1 = conv_norm(dim, dim // 4, 3, leaky=leaky)
        self.conv5X5_2 = conv_norm(dim // 4, dim // 4, 3)
        self.conv7X7_2 = conv_norm(dim // 4, dim // 4, 3, leaky=leaky)
        self.conv7x7_3 = conv_norm(dim // 4, dim // 4, 3)

    def forward(self, x):
        y = self.conv5X5_1(x)
        windows = self.conv3X3(x), self.conv5X5_2(y), self.conv7x7_3(self.conv7X7_2(y))
        return torch.cat(windows, dim=1).relu()


class RetinaFace(nn.Module):
    """RetinaFace (Deng et al. 2020), key names of facexlib's detection_*_Final.pth."""

    def __init__(self, body, dim):
        super().__init__()
        leaky = 0.1 if dim <= 64 else 0
        self.body, self.fpn = body, nn.ModuleDict()  # a feature pyramid (Lin et al. 2017)
        for level, dim_in in enumerate(body.dims, 1):
            self.fpn[f"output{level}"] = conv_norm(dim_in, dim, 1, leaky=leaky)
        self.fpn["merge1"], self.fpn["merge2"] = (conv_norm(dim, dim, 3, leaky=leaky) for _ in range(2))
        self.ssh1, self.ssh2, self.ssh3 = (SSH(dim, leaky) for _ in range(3))
        self.ClassHead, self.BboxHead, self.LandmarkHead = (
            nn.ModuleList(nn.ModuleDict({"conv1x1": nn.Conv2d(dim, 2 * values, 1)}) for _ in range(3))
            for values in (2, 4, 10))

    @classmethod
    def from_shapes(cls, shapes):
        dim = shapes["fpn.output1.0.weight"][0]
        resnet = shapes.get("body.conv1.weight")
        return cls(ResNet(resnet[0], depths_of(shapes, "body.")) if resnet
                   else MobileNet(shapes["body.stage1.0.0.weight"][0]), dim)

    def forward(self, image):
        """image [B, 3, H, W], BGR in 0..255 less its mean -> scores [B, P] and regressions [B, P, 4] and
        [B, P, 10], in the order of priors(H, W)."""
        fine, middle, coarse = (self.fpn[f"output{level}"](x) for level, x in enumerate(self.body(image), 1))
        middle = self.fpn["merge2"](middle + F.interpolate(coarse, middle.shape[2:]))
        fine = self.fpn["merge1"](fine + F.interpolate(middle, fine.shape[2:]))
        maps = self.ssh1(fine), self.ssh2(middle), self.ssh3(coarse)

        def read(head, values):
            cells = (layer["conv1x1"](x).permute(0, 2, 3, 1) for layer, x in zip(head, maps))
            return torch.cat([cell.reshape(len(image), -1, values) for cell in cells], dim=1)
        scores = read(self.ClassHead, 2).softmax(-1)[..., 1]
        return scores, read(self.BboxHead, 4), read(self.LandmarkHead, 10)


def priors(height, width):
    """The squares that RetinaFace's regressions start from, [P, 3]: centre x, y and side, in pixels."""
    maps = []
    for step, sides in ((8, (16.0, 32.0)), (16, (64.0, 128.0)), (32, (256.0, 512.0))):
        y, x = ((torch.arange(math.ceil(length / step)) + 0.5) * step for length in (height, width))
        maps.append(torch.cartesian_prod(y, x, torch.tensor(sides))[:, [1, 0, 2]])
    return torch.cat(maps)


def decode(prior, box, landmarks):
    """Regressions [P, 4] and [P, 10] -> boxes [P, 4] (left, top, right, bottom) and landmarks [P, 5, 2]."""
    centre, side = prior[:, :2], prior[:, 2:]  # 0.1 and 0.2 are the release's variances
    middle, half = centre + 0.1 * side * box[:, :2], side * (0.2 * box[:, 2:]).exp() / 2
    points = centre[:, None] + 0.1 * side[:, None] * landmarks.unflatten(1, (5, 2))
    return torch.cat((middle - half, middle + half), dim=1), points


def iou(box, boxes):
    """One box [4] with others [n, 4]: intersection over union [n]. A box ends on its last pixel: +1."""
    def area(low, high):
        return (high - low + 1).clamp(min=0).prod(-1)
    inside = area(torch.maximum(box[:2], boxes[:, :2]), torch.minimum(box[2:], boxes[:, 2:]))
    return inside / (area(box[:2], box[2:]) + area(boxes[:, :2], boxes[:, 2:]) - inside)


def nms(boxes, scores, limit=0.4):
    """Indices of the boxes that no better one overlaps by more than limit, best first."""
    order, keep = scores.argsort(descending=True, stable=True), []
    while len(order):
        best, order = order[0], order[1:]
        keep.append(best.item())
        order = order[iou(boxes[best], boxes[order]) <= limit]
    return keep


# ---------------------------------------------------------------------------------------------------- ArcFace
class IBlock(nn.Module):
    """The improved residual block of ArcFace; the stride is conv2's."""

    def __init__(self, dim_in, dim, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(dim_in), nn.Conv2d(dim_in, dim, 3, 1, 1, bias=False)
        self.bn2, self.prelu = nn.BatchNorm2d(dim), nn.PReLU(dim)
        self.conv2, self.bn3 = nn.Conv2d(dim, dim, 3, stride, 1, bias=False), nn.BatchNorm2d(dim)
        self.downsample = conv_norm(dim_in, dim, 1, stride) if stride > 1 else None

    def forward(self, x):
        y = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        return self.bn3(self.conv2(y)) + (x if self.downsample is None else self.downsample(x))


class ArcFace(nn.Module):
    """ArcFace's IResNet (Deng et al. 2019), key names of arcface_torch's backbone.pth; IResNet-50 has depths
    3, 4, 14, 3, IResNet-100 3, 13, 30, 3."""
    side = 112

    def __init__(self, width=64, depths=(3, 13, 30, 3), features=512):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1, self.prelu = nn.BatchNorm2d(width), nn.PReLU(width)
        self.layer1, self.layer2, self.layer3, self.layer4 = layers(
            IBlock, width, [width << level for level in range(4)], depths)
        self.bn2, self.fc = nn.BatchNorm2d(8 * width), nn.Linear(8 * width * (self.side // 16) ** 2, features)
        self.features = nn.BatchNorm1d(features)

    @classmethod
    def from_shapes(cls, shapes):
        return cls(shapes["conv1.weight"][0], depths_of(shapes), shapes["fc.weight"][0])

    def forward(self, crop):
        """Aligned crops [N, 3, 112, 112] in -1..1 -> [N, features], not normalised."""
        x = self.prelu(self.bn1(self.conv1(crop)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.features(self.fc(self.bn2(x).flatten(1)))


# -------------------------------------------------------------------------------------------------- head pose
class SixDRepNet(nn.Module):
    """6DRepNet (Hempel et al. 2022), key names of 6DRepNet_300W_LP_AFLW2000.pth: RepVGG-B1g2 with its
    branches folded into one convolution a block. Every second block is in two groups."""
    side = 224

    def __init__(self, dims=(64, 128, 256, 512, 2048), depths=(4, 6, 16, 1)):
        super().__init__()
        groups = itertools.chain([1], itertools.cycle([1, 2]))

        def block(dim_in, dim, stride):
            conv = nn.Conv2d(dim_in, dim, 3, stride, 1, groups=next(groups))
            return nn.Sequential(OrderedDict(rbr_reparam=conv, relu=nn.ReLU()))
        self.layer0 = block(3, dims[0], 2)
        self.layer1, self.layer2, self.layer3, self.layer4 = layers(block, dims[0], dims[1:], depths)
        self.linear_reg = nn.Linear(dims[4], 6)

    @classmethod
    def from_shapes(cls, shapes):
        firsts = ("layer0", "layer1.0", "layer2.0", "layer3.0", "layer4.0")
        return cls([shapes[f"{name}.rbr_reparam.weight"][0] for name in firsts], depths_of(shapes))

    def forward(self, crop):
        """Crops [N, 3, 224, 224] in -1..1 -> head to camera [N, 3, 3], x right, y up, z to the viewer."""
        mean, std = torch.tensor(IMAGENET).to(crop)[..., None, None]
        crop = ((crop + 1) / 2 - mean) / std
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.layer0(crop)))))
        a, b = self.linear_reg(x.mean((2, 3))).unflatten(1, (2, 3)).unbind(1)
        x = F.normalize(a, dim=1)
        z = F.normalize(torch.linalg.cross(x, b), dim=1)
        return torch.stack((x, torch.linalg.cross(z, x), z), dim=1)  # rows: 300W-LP's are camera to head


def angles_of(rotation):
    """Head to camera [N, 3, 3] -> yaw, pitch, roll [N, 3]: azimuth and elevation of where the face points,
    and its tilt. 6DRepNet's own yaw and roll have the other sign, and its turns another order."""
    x, y, z = rotation[:, :, 2].unbind(1)
    roll = torch.atan2(rotation[:, 1, 0], rotation[:, 1, 1])
    return torch.stack((torch.atan2(x, z), torch.atan2(y, torch.hypot(x, z)), roll), dim=1).rad2deg()


def rotation_of(landmarks):
    """Five landmarks [N, 5, 2] -> head to camera [N, 3, 3], a weak-perspective fit of the mean face: the
    affine camera by least squares, then the rotation nearest to it."""
    model = torch.tensor(MEAN_FACE, dtype=landmarks.dtype)
    points = (landmarks - landmarks.mean(1, keepdim=True)) * torch.tensor((1, -1))
    camera = (torch.linalg.pinv(model - model.mean(0)) @ points).mT  # [N, 2, 3]
    U, _, V = torch.linalg.svd(camera, full_matrices=False)
    x, y = (U @ V).unbind(1)
    return torch.stack((x, y, torch.linalg.cross(x, y)), dim=1)


# ----------------------------------------------------------------------------------------- aesthetic quality
class CLIPBlock(nn.Module):
    def __init__(self, dim, ffn_dim):
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        projections = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(dim, dim) for name in projections})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, ffn_dim), "fc2": nn.Linear(ffn_dim, dim)})

    def forward(self, x):
        y, attention = self.layer_norm1(x), self.self_attn
        q, k, v = (attention[name](y).unflatten(2, (-1, 64)).transpose(1, 2)  # heads are 64 wide in all sizes
                   for name in ("q_proj", "k_proj", "v_proj"))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + attention["out_proj"](y)
        y = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](y * (1.702 * y).sigmoid())  # QuickGELU


class CLIP(nn.Module):
    """The image tower of CLIP (Radford et al. 2021), key names of Hugging Face's model.safetensors, of which
    the text tower is not read."""
    unused = ("text_model.", "text_projection.", "logit_scale", "vision_model.embeddings.position_ids")

    def __init__(self, dim=1024, ffn_dim=4096, num_layers=24, patch=14, patches=256, features=768):
        super().__init__()
        self.patch, self.side = patch, patch * math.isqrt(patches)
        embeddings, tower = nn.Module(), nn.Module()
        embeddings.class_embedding = nn.Parameter(torch.zeros(dim))
        embeddings.patch_embedding = nn.Conv2d(3, dim, patch, patch, bias=False)
        embeddings.position_embedding = nn.Embedding(1 + patches, dim)
        tower.embeddings = embeddings
        tower.pre_layrnorm, tower.post_layernorm = nn.LayerNorm(dim), nn.LayerNorm(dim)  # spelt as released
        tower.encoder = nn.ModuleDict({"layers": nn.ModuleList(CLIPBlock(dim, ffn_dim)
                                                               for _ in range(num_layers))})
        self.vision_model, self.visual_projection = tower, nn.Linear(dim, features, bias=False)

    @classmethod
    def from_shapes(cls, shapes):
        tower = "vision_model."
        dim, _, _, patch = shapes[f"{tower}embeddings.patch_embedding.weight"]
        ffn_dim, _ = shapes[f"{tower}encoder.layers.0.mlp.fc1.weight"]
        num_layers = sum(name.endswith("mlp.fc1.weight") for name in shapes)
        patches = shapes[f"{tower}embeddings.position_embedding.weight"][0] - 1
        return cls(dim, ffn_dim, num_layers, patch, patches, shapes["visual_projection.weight"][0])

    def forward(self, crop):
        """Pictures [N, 3, side, side] in -1..1 -> [N, features], not normalised."""
        mean, std = torch.tensor(CLIP_RGB).to(crop)[..., None, None]
        tower = self.vision_model
        x = tower.embeddings.patch_embedding(((crop + 1) / 2 - mean) / std).flatten(2).transpose(1, 2)
        first = tower.embeddings.class_embedding.expand(len(x), 1, -1)
        x = tower.pre_layrnorm(torch.cat((first, x), dim=1) + tower.embeddings.position_embedding.weight)
        for block in tower.encoder["layers"]:
            x = block(x)
        return self.visual_projection(tower.post_layernorm(x[:, 0]))


class AestheticHead(nn.Module):
    """LAION's sac+logos+ava1-l14-linearMSE.pth: five linear layers without anything between them."""

    def __init__(self, dims=(768, 1024, 128, 64, 16, 1)):
        super().__init__()
        places = ("0", "2", "4", "6", "7")  # dropouts stood between
        self.layers = nn.ModuleDict(dict(zip(places, map(nn.Linear, dims, dims[1:]))))

    @classmethod
    def from_shapes(cls, shapes):
        first, dims = shapes["layers.0.weight"][1], (shapes[f"layers.{n}.weight"][0] for n in (0, 2, 4, 6, 7))
        return cls([first, *dims])

    def forward(self, features):
        for layer in self.layers.values():
            features = layer(features)
        return features[:, 0]


class Aesthetic:
    """LAION's aesthetic score, about 1 to 10, of CLIP's features as unit vectors."""
    FILES = {CLIP: ("clip*/model.safetensors", "clip*.safetensors"), AestheticHead: ("*linearMSE.*",)}

    def __init__(self, clip, head):
        self.clip, self.head = clip, head

    @classmethod
    def load(cls, folder, device="cpu"):
        """Both networks in `folder`, or None, which is said, where one is missing."""
        networks = []
        for kind, patterns in cls.FILES.items():
            found = sorted(path for pattern in patterns for path in Path(folder).glob(pattern))
            if not found:
                print(f"{folder} holds no {kind.__name__} ({' or '.join(patterns)}): no aesthetic score",
                      file=sys.stderr, flush=True)
                return None
            networks.append(load_released(kind, found[0], device))
        return cls(*networks)

    @torch.no_grad()
    def __call__(self, image):
        """A picture [3, H, W] in -1..1 -> its score. The middle square counts, as in CLIP."""
        _, height, width = image.shape
        scale, side = self.clip.side / min(height, width), self.clip.side
        size = [max(side, round(n * scale)) for n in (height, width)]
        image = resize(image[None], size, mode="bicubic").clamp(-1, 1)
        top, left = ((n - side) // 2 for n in size)
        crop = image[:, :, top:top + side, left:left + side].to(self.clip.visual_projection.weight.device)
        return float(self.head(F.normalize(self.clip(crop), dim=1)))


# ------------------------------------------------------------------------------------------------------ crops
def similarity(source, target):
    """Turn, scale and shift that bring points [N, 5, 2] nearest to others, by squared distances there:
    complex factor and shift [N]. It is Umeyama's solution; a complex factor cannot mirror. Where next to
    nothing would be left of the points, as where all are equal, it is a shift alone: no factor is 0."""
    a, b = (torch.view_as_complex(points.contiguous()) for points in (source, target))
    x, y = (points - points.mean(1, keepdim=True) for points in (a, b))
    factor = (x.conj() * y).sum(1) / x.abs().square().sum(1).clamp(min=1e-12)
    factor = torch.where(factor.abs() > 1e-5, factor, 1)
    return factor, b.mean(1) - factor * a.mean(1)


def align(image, landmarks, side=112):
    """image [3, H, W] and landmarks [N, 5, 2] of faces in it -> crops [N, 3, side, side] as ArcFace was
    trained on, black beyond the picture: the landmarks fitted to their places in the crop, as insightface's
    norm_crop does. The places fitted to the landmarks would be another crop wherever a head is turned."""
    landmarks = landmarks.to(image)
    target = torch.tensor(ALIGNED).to(image) * side / 112
    factor, shift = similarity(landmarks, target.expand_as(landmarks))  # from the picture to the crop
    pixel = torch.complex(*torch.meshgrid([torch.arange(side).to(image)] * 2, indexing="xy"))
    at = torch.view_as_real((pixel - shift[:, None, None]) / factor[:, None, None])
    grid = 2 * at / (torch.tensor(image.shape[:0:-1]).to(image) - 1).clamp(min=1) - 1
    return F.grid_sample((image + 1).expand(len(grid), -1, -1, -1), grid, align_corners=True) - 1


def crop_faces(image, boxes, margin=0.2, side=224):
    """image [3, H, W] and boxes [N, 4] in it -> squares [N, 3, side, side] around them, with that margin, in
    box sides, on every side; the picture's edge is drawn out."""
    crops = image.new_zeros(len(boxes), 3, side, side)
    limits = torch.tensor(image.shape[:0:-1])
    for crop, box in zip(crops, boxes):
        low, high = (torch.minimum(corner.clamp(min=0), limits) for corner in (box[:2], box[2:]))
        length = max(round((1 + 2 * margin) * (high - low).max().item()), 1)
        start = ((low + high - length) / 2).round().long()
        columns, rows = ((a + torch.arange(length)).clamp(0, n - 1) for a, n in zip(start, limits))
        crop[:] = resize(image[:, rows][None, :, :, columns], (side, side))[0]
    return crops


# ---------------------------------------------------------------------------------------- all from one folder
class Detection(NamedTuple):
    box: torch.Tensor  # [4]: left, top, right, bottom
    score: float
    landmarks: torch.Tensor  # [5, 2]


class Faces:
    """The networks in `folder`, one file each, kept in memory: about 0.5 GB. Says once which are missing."""
    FILES = {RetinaFace: "detection_*_Final.*", ArcFace: "backbone*.*", SixDRepNet: "6DRepNet*.*"}
    WITHOUT = {ArcFace: "an identity is one track, so references come from the clip itself",
               SixDRepNet: "head pose comes from the five landmarks, which is less exact"}
    longest = 960  # larger pictures are shrunk to this before detection
    batch = 8

    def __init__(self, folder, device="cpu"):
        self.device = torch.device(device)
        self.detector, self.embedder, self.poser = (self.load(Path(folder), kind) for kind in self.FILES)

    def load(self, folder, kind):
        """The network of that kind, or None; ResNet-50 where both RetinaFaces are there."""
        found = sorted(folder.glob(self.FILES[kind]))
        if found:
            return load_released(kind, found[0], self.device)
        missing = f"{folder} holds no {kind.__name__} ({self.FILES[kind]})"
        if kind not in self.WITHOUT:
            raise UserError(f"{missing}; see videos/README.md")
        print(f"{missing}: {self.WITHOUT[kind]}", file=sys.stderr, flush=True)

    @torch.no_grad()
    def detect(self, images, least=0.5):
        """Pictures [B, 3, H, W] -> for each a list of Detections that score more than `least`, best first."""
        size = images.shape[2:]
        height, width = (max(round(n * min(self.longest / max(size), 1)), 1) for n in size)
        cells, scale = priors(height, width), torch.tensor((size[1] / width, size[0] / height))
        mean = torch.tensor((104.0, 117.0, 123.0), device=self.device)[:, None, None]
        found = []
        for piece in images.split(self.batch):
            bgr = (resize(piece.to(self.device), (height, width)).flip(1) + 1) * 127.5 - mean
            for scores, *regressions in zip(*(output.cpu() for output in self.detector(bgr))):
                best = scores.argsort(descending=True, stable=True)[:5000]
                best = best[scores[best] > least]
                boxes, points = decode(cells[best], *(r[best] for r in regressions))
                found.append([Detection(boxes[i] * scale.repeat(2), scores[best[i]].item(), points[i] * scale)
                              for i in nms(boxes, scores[best])])
        return found

    def run(self, network, crops):
        return torch.cat([network(resize(piece.to(self.device), (network.side, network.side))).cpu()
                          for piece in crops.split(self.batch)])

    @torch.no_grad()
    def embed(self, crops):
        """Crops from align, [N, 3, 112, 112] -> unit vectors [N, 512], or None without ArcFace."""
        return self.embedder and F.normalize(self.run(self.embedder, crops), dim=1)

    @torch.no_grad()
    def pose(self, crops, landmarks):
        """Crops from crop_faces, [N, 3, S, S], and landmarks [N, 5, 2] -> yaw, pitch, roll [N, 3] in degrees,
        from the crops or, without SixDRepNet, from the landmarks; nan where these are not finite."""
        if self.poser:
            return angles_of(self.run(self.poser, crops))
        angles, seen = torch.full((len(crops), 3), torch.nan), landmarks.isfinite().all(-1).all(-1)
        angles[seen] = angles_of(rotation_of(landmarks[seen].float()))
        return angles


class Face(NamedTuple):
    """What is seen of a Detection in a video's picture."""
    frame: int
    box: torch.Tensor  # left, top, right, bottom in pixels
    yaw: float
    pitch: float
    side: float  # pixels at 480p
    sharpness: float  # variance of its Laplacian with a margin at 112 pixels, whatever the source's size
    embedding: torch.Tensor | None
    landmarks: torch.Tensor  # [5, 2]


def find_faces(detector, picture, frame, least):
    """The Faces of a uint8 picture [H, W, 3] that score at least `least`; of a crowd, the largest."""
    image = torch.from_numpy(picture).permute(2, 0, 1) / 127.5 - 1
    found = [face for face in detector.detect(image[None])[0] if face.score >= least]
    if not found:
        return []
    if len(found) > MOST_FACES:
        sides = torch.stack([face.box[2:] - face.box[:2] for face in found]).amax(1).nan_to_num(0)
        found = [found[i] for i in sides.argsort(descending=True, stable=True)[:MOST_FACES]]
    boxes = torch.stack([face.box for face in found])
    landmarks = torch.stack([face.landmarks for face in found])
    squares = crop_faces(image, boxes)
    angles = detector.pose(squares, landmarks).tolist()
    embeddings = detector.embed(align(image, landmarks))
    if embeddings is None:
        embeddings = [None] * len(found)
    sides = (boxes[:, 2:] - boxes[:, :2]).amax(1) * (480 / min(picture.shape[:2]))
    grey = F.interpolate(squares, (112, 112), mode="area").mean(1, keepdim=True) * 127.5
    laplacian = torch.tensor([[[[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]]])
    sharpness = F.conv2d(grey, laplacian).flatten(1).var(1)
    return [Face(frame, box, yaw, pitch, side, sharp, embedding, points)
            for box, (yaw, pitch, _), side, sharp, embedding, points
            in zip(boxes, angles, sides.tolist(), sharpness.tolist(), embeddings, landmarks)]
