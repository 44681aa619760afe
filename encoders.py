"""The frozen networks around the transformer: what it sees of text, of pictures and of references.
None of them is trained here.

Module trees carry the key names of the released files, so load_state_dict(strict=True) works on them. The toy
world uses the same classes, small and randomly initialised from a fixed seed.
  Tokenizer, UMT5    umT5 text encoder, as Wan uses it
  DINOv2             the ViT whose hidden states feed MFI
  ToyCodec           the toy's stand-in for the VAE: pixels folded into channels, exactly invertible
"""
import html
import math

import sentencepiece
import torch
import torch.nn as nn
import torch.nn.functional as F


# ------------------------------------------------------------------------------------------------------- text
class Tokenizer:
    """sentencepiece model file -> ids and mask, with Wan's cleaning: HTML unescaped twice,
    white space collapsed, </s> last."""

    def __init__(self, path, max_len=512):
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.max_len = max_len

    def __call__(self, texts):
        """A list of B strings -> ids, mask int64 [B, S]; S is the longest one's length, at most max_len,
        padded with 0."""
        rows = [" ".join(html.unescape(html.unescape(text)).split()) for text in texts]
        rows = [ids[: self.max_len - 1] + [self.model.eos_id()] for ids in self.model.encode(rows)]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


class T5Norm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * y.to(self.weight.dtype)


class T5Attention(nn.Module):
    """No 1/sqrt(d), no biases; softmax in float32."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x, bias):
        """x [B, S, D], bias [B, N, S, S] -> [B, S, D]."""
        q, k, v = (m(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        scores = (q @ k.transpose(-1, -2)).float() + bias
        return self.o((scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2))


class T5FFN(nn.Module):
    def __init__(self, dim, ffn_dim):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(dim, ffn_dim, bias=False), nn.GELU("tanh"))
        self.fc1 = nn.Linear(dim, ffn_dim, bias=False)
        self.fc2 = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x):
        return self.fc2(self.fc1(x) * self.gate(x))


class RelativeBias(nn.Module):
    """T5's bidirectional relative position bias; umT5 has one for every layer."""

    def __init__(self, num_heads, buckets=32, max_distance=128):
        super().__init__()
        self.embedding = nn.Embedding(buckets, num_heads)
        self.max_distance = max_distance

    def forward(self, length):
        """-> [N, S, S]. Half the buckets for each direction; half of those exact,
        the others logarithmic in distance."""
        at = torch.arange(length, device=self.embedding.weight.device)
        offset = at[None] - at[:, None]  # key minus query
        half = self.embedding.num_embeddings // 2
        exact = half // 2
        distance = offset.abs()
        ratio = torch.log(distance.clamp(min=1) / exact) / math.log(self.max_distance / exact)
        far = exact + (ratio * (half - exact)).long()
        bucket = (offset > 0) * half + torch.where(distance < exact, distance, far.clamp(max=half - 1))
        return self.embedding(bucket).permute(2, 0, 1)


class T5Block(nn.Module):
    def __init__(self, dim, ffn_dim, num_heads):
        super().__init__()
        self.norm1, self.attn = T5Norm(dim), T5Attention(dim, num_heads)
        self.norm2, self.ffn = T5Norm(dim), T5FFN(dim, ffn_dim)
        self.pos_embedding = RelativeBias(num_heads)

    def forward(self, x, mask_bias):
        x = x + self.attn(self.norm1(x), self.pos_embedding(x.shape[1]) + mask_bias)
        return x + self.ffn(self.norm2(x))


class UMT5(nn.Module):
    """umT5 encoder (Chung et al. 2023), key names of Wan's models_t5_umt5-xxl-enc-bf16.pth;
    defaults are umT5-XXL."""

    def __init__(self, vocab=256384, dim=4096, ffn_dim=10240, num_heads=64, num_layers=24):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(T5Block(dim, ffn_dim, num_heads) for _ in range(num_layers))
        self.norm = T5Norm(dim)

    def forward(self, ids, mask):
        """ids, mask [B, S] -> [B, S, dim]; rows where mask is 0 hold nothing of use."""
        x = self.token_embedding(ids)
        mask_bias = torch.where(mask[:, None, None] > 0, 0.0, torch.finfo(torch.float32).min)  # [B, 1, 1, S]
        for block in self.blocks:
            x = block(x, mask_bias)
        return self.norm(x)


# -------------------------------------------------------------------------------------------------------- ViT
class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class ViTAttention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, N, L, K]
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ViTMLP(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class ViTBlock(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1, self.attn, self.ls1 = (nn.LayerNorm(dim, eps=1e-6), ViTAttention(dim, num_heads),
                                           LayerScale(dim))
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(dim, eps=1e-6), ViTMLP(dim), LayerScale(dim)

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, dim, patch):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, image):
        return self.proj(image)


class DINOv2(nn.Module):
    """DINOv2 ViT (Oquab et al. 2023), key names of the released dinov2_vit*14_pretrain.pth;
    defaults are ViT-L/14 at 518 pixels."""

    def __init__(self, dim=1024, num_layers=24, num_heads=16, patch=14, image_size=518,
                 levels=(5, 11, 17, 23)):
        super().__init__()
        self.patch, self.levels = patch, levels
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch) ** 2, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))  # unused here, in the released files
        self.patch_embed = PatchEmbed(dim, patch)
        self.blocks = nn.ModuleList(ViTBlock(dim, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def positions(self, h, w):
        """The position embedding [1, 1 + h*w, D], bicubically resized to h x w patches;
        0.1 added to the scale as the release does."""
        cls, grid = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        side = math.isqrt(grid.shape[1])
        if (h, w) != (side, side):
            grid = grid.unflatten(1, (side, side)).permute(0, 3, 1, 2)
            scale = ((h + 0.1) / side, (w + 0.1) / side)
            resized = F.interpolate(grid.float(), scale_factor=scale, mode="bicubic")
            grid = resized.to(cls.dtype).flatten(2).transpose(1, 2)
        return torch.cat((cls, grid), dim=1)

    def forward(self, image):
        """image [B, 3, H, W], ImageNet-normalised, sides a multiple of the patch -> the chosen layers'
        outputs [B, levels, 1 + H*W/patch^2, dim], CLS first, before the final norm."""
        x = self.patch_embed(image)
        h, w = x.shape[2:]
        tokens = torch.cat((self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)), dim=1)
        x = tokens + self.positions(h, w)
        states = []
        for block in self.blocks:
            x = block(x)
            states.append(x)
        return torch.stack([states[level] for level in self.levels], dim=1)


# -------------------------------------------------------------------------------------------------- toy codec
class ToyCodec:
    """Space to depth: the toy's exactly invertible VAE, 4x4 pixels to one latent of 48 channels,
    every frame its own."""
    stride = 4

    def encode(self, video):
        """[B, 3, F, H, W] in -1..1 -> [B, 48, F, H/4, W/4]; errors where H or W is no multiple of 4."""
        return F.pixel_unshuffle(video.transpose(1, 2), self.stride).transpose(1, 2)

    def decode(self, latent):
        return F.pixel_shuffle(latent.transpose(1, 2), self.stride).transpose(1, 2)
