import re
import weakref

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import pad
from transformers import Dinov2Config, Dinov2Model, UMT5Config, UMT5EncoderModel

from networks import encoders
from networks.encoders import UMT5, DINOv2, RelativeBias, Tokenizer, WanEncoders, WanVAE, tile_windows
from networks.weights import load_weights, read_weights
from support.script import UserError
from videos import toy
from helpers import LiveBytes, randomise

CPU = torch.device("cpu")


def error(a, b):
    """Largest difference over largest value."""
    assert a.shape == b.shape and a.isfinite().all()
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "spiece.model"
    toy.train_tokenizer(path)
    return Tokenizer(path)


def test_tokenizer_cleans_ends_and_pads(tokenizer):
    ids, mask = tokenizer(["a close-up of  one\nperson &amp;amp; a &lt;tree", "", "a close-up"])
    assert ids.shape == mask.shape and mask.sum(1).tolist() == [ids.shape[1], 1, int(mask[2].sum())]
    assert all(row[n - 1] == tokenizer.model.eos_id() == 1 for row, n in zip(ids, mask.sum(1), strict=True))
    assert not ids[mask == 0].any()
    assert tokenizer.model.decode(ids[2, : mask[2].sum() - 1].tolist()) == "a close-up"
    assert torch.equal(tokenizer(["a  close-up "])[0], tokenizer(["a close-up"])[0])


def test_a_text_is_cut_where_wan_cuts_it_and_that_is_said_once(tokenizer, monkeypatch, capsys):
    full, _ = tokenizer(["a close-up of one person"])
    length = full.shape[1]
    assert Tokenizer.max_len == 512 and not capsys.readouterr().err
    monkeypatch.setattr(tokenizer, "max_len", length)
    assert torch.equal(tokenizer(["a close-up of one person"])[0], full) and not capsys.readouterr().err
    monkeypatch.setattr(tokenizer, "max_len", length - 1)
    for text in ("a close-up of one person", "a  close-up of\none person"):
        cut, mask = tokenizer([text])
        assert mask.all() and torch.equal(cut[0, :-1], full[0, : length - 2]) and cut[0, -1] == 1
    text = "'a close-up of one person'"
    line = f"cut to the first {length - 2} of {length - 1} tokens, as no more are read: {text}...\n"
    assert capsys.readouterr().err == line


def test_every_toy_caption_survives_the_tokenizer(tokenizer):
    clips = toy.draw_clips(50, 1, "test") + toy.draw_clips(50, 2, "test")
    captions = [toy.caption(clip) for clip in clips]
    ids, mask = tokenizer(captions)
    assert not (ids[mask == 1] == tokenizer.model.unk_id()).any()
    read = [tokenizer.model.decode(row[: n - 1].tolist()) for row, n in zip(ids, mask.sum(1), strict=True)]
    assert read == captions


def test_umt5_ignores_what_is_masked():
    torch.manual_seed(0)
    net = UMT5(vocab=50, dim=32, ffn_dim=64, num_heads=4, num_layers=2)
    short, long = torch.tensor([[5, 6, 1]]), torch.tensor([[5, 6, 1, 9, 9]])
    a, b = net(short, torch.ones(1, 3)), net(long, torch.tensor([[1, 1, 1, 0, 0]]))
    torch.testing.assert_close(a, b[:, :3])
    assert not torch.allclose(net(torch.tensor([[6, 5, 1]]), torch.ones(1, 3))[:, 2], a[:, 2])  # order counts


def test_relative_buckets_are_t5s():
    """Distances to buckets by T5's rule: 16 a direction, 8 of them exact, the rest logarithmic up to 128."""
    bias = RelativeBias(1)
    bias.embedding.weight.data = torch.arange(32.0)[:, None]
    bucket = bias(200)[0]  # [query, key]
    assert bucket[0, :9].tolist() == [0, 17, 18, 19, 20, 21, 22, 23, 24]  # keys after the query: 16 and up
    assert bucket[:8, 0].tolist() == list(range(8))
    assert bucket[0, [11, 12, 15, 16, 22, 23, 127, 199]].tolist() == [24, 25, 25, 26, 26, 27, 31, 31]
    assert bucket[199, 0] == 15 and (bucket.diff(dim=0)[:, 0] >= 0).all()


def test_vit_gives_the_chosen_layers():
    torch.manual_seed(0)
    net = DINOv2(dim=32, num_layers=3, num_heads=2, patch=8, image_size=32, levels=(0, 2))
    image = torch.randn(2, 3, 32, 32)
    states = net(image)
    assert states.shape == (2, 2, 17, 32)
    net.levels = (2,)
    assert torch.equal(net(image)[:, 0], states[:, 1])
    assert net(torch.randn(1, 3, 48, 32)).shape == (1, 1, 25, 32)  # other sizes: the position grid is resized
    assert DINOv2(8, num_layers=6, num_heads=1).levels == (2, 5)  # the middle one and the last


@pytest.mark.parametrize("size, shape", [(32, (48, 5, 4, 6)), (64, (192, 5, 2, 3))])  # 8 latents a side
def test_toy_codec_is_exactly_invertible(size, shape):
    codec, video = toy.ToyCodec(size), torch.randn(2, 3, 5, 16, 24)
    latent = codec.encode(video)
    assert latent.shape == (2, *shape) and torch.equal(codec.decode(latent), video)
    assert torch.equal(codec.encode(video[:, :, 2:3])[:, :, 0], latent[:, :, 2])  # every frame is its own


def test_the_toys_frozen_networks_are_the_same_everywhere(tmp_path):
    toy.train_tokenizer(tmp_path / "spiece.model")
    torch.manual_seed(1)
    a = toy.ToyEncoders(tmp_path, 32)
    torch.manual_seed(2)
    b = toy.ToyEncoders(tmp_path, 32)
    rows = a.text(["a close-up of one person", ""])
    assert torch.equal(rows, b.text(["a close-up of one person", ""]))
    assert rows.shape[::2] == (2, toy.TEXT_DIM) and not rows[1, 1:].any()
    image = torch.zeros(1, 3, 32, 32)
    assert torch.equal(a.features(image), b.features(image))


# -------------------------------------------------------------------------------- sizes of the released files
def test_full_sizes_are_the_released_ones():
    """Tensors and parameters of Wan2.1_VAE.pth, models_t5_umt5-xxl-enc-bf16.pth and DINOv2 S, B, L."""
    with torch.device("meta"):
        nets = [WanVAE(), UMT5(), DINOv2(384, 12, 6), DINOv2(768, 12, 12), DINOv2()]
    counts = [(len(net.state_dict()), sum(p.numel() for p in net.parameters())) for net in nets]
    assert counts == [(194, 126_892_531), (242, 5_680_910_336), (175, 22_056_576), (175, 86_580_480),
                      (343, 304_368_640)]


def test_vae_keys_are_wans():
    with torch.device("meta"):
        keys = WanVAE().state_dict().keys()
    wb, layers = r"(weight|bias)", r"(downsamples|middle|upsamples)\.\d+"
    layer = rf"(residual\.[03]\.gamma|residual\.[26]\.{wb}|(shortcut|resample\.1|time_conv)\.{wb})"
    layer = rf"({layer}|norm\.gamma|(to_qkv|proj)\.{wb})"
    coder = rf"(encoder|decoder)\.(conv1\.{wb}|{layers}\.{layer}|head\.0\.gamma|head\.2\.{wb})"
    assert all(re.fullmatch(rf"conv[12]\.{wb}|{coder}", key) for key in keys)
    assert {key.split(".")[2] for key in keys if ".downsamples." in key} == {str(i) for i in range(11)}
    assert {key.split(".")[2] for key in keys if ".upsamples." in key} == {str(i) for i in range(15)}
    assert {key.rsplit(".", 2)[0] for key in keys if "time_conv.weight" in key} == {
        f"encoder.downsamples.{i}" for i in (5, 8)
    } | {f"decoder.upsamples.{i}" for i in (3, 7)}


# -------------------------------------------------------------------------------------------------- Wan's VAE
def to_diffusers(key):
    """A name in Wan2.1_VAE.pth -> the name in diffusers' AutoencoderKLWan."""
    key = re.sub(r"^conv1", "quant_conv", re.sub(r"^conv2", "post_quant_conv", key))
    key = key.replace("coder.conv1", "coder.conv_in")
    key = key.replace("head.0", "norm_out").replace("head.2", "conv_out")
    key = key.replace("middle.0", "mid_block.resnets.0").replace("middle.2", "mid_block.resnets.1")
    key = key.replace("middle.1", "mid_block.attentions.0").replace("downsamples", "down_blocks")
    for index, name in {"0": "norm1", "2": "conv1", "3": "norm2", "6": "conv2"}.items():
        key = key.replace(f"residual.{index}", name)

    def up(match):  # four levels of three residual blocks and, but for the last, an up-sampler
        level, i = divmod(int(match[1]), 4)
        return f"up_blocks.{level}." + ("upsamplers.0" if i == 3 else f"resnets.{i}")

    return re.sub(r"upsamples\.(\d+)", up, key).replace("shortcut", "conv_shortcut")


@pytest.fixture(scope="module")
def vae():
    return randomise(WanVAE(dim=8))


@pytest.fixture(scope="module")
def diffusers_vae(vae):
    net = AutoencoderKLWan(base_dim=8, z_dim=16)
    net.load_state_dict({to_diffusers(key): value for key, value in vae.state_dict().items()}, strict=True)
    return net.eval()


@pytest.mark.parametrize("frames", [1, 5, 9, 17])
@torch.no_grad()
def test_vae_is_diffusers_vae(vae, diffusers_vae, frames):
    torch.manual_seed(frames)
    video = torch.rand(3, 3, frames, 24, 32) * 2 - 1
    mean, std = (
        torch.tensor(getattr(diffusers_vae.config, name))[:, None, None, None]
        for name in ("latents_mean", "latents_std")
    )
    latent = vae.encode(video)
    assert latent.shape == (3, 16, (frames + 3) // 4, 3, 4)
    encoded = error(latent, (diffusers_vae.encode(video).latent_dist.mode() - mean) / std)
    latent = torch.randn_like(latent)
    decoded = vae.decode(latent)
    clamped = (decoded.abs() == 1).float().mean()
    assert decoded.shape == video.shape and clamped < 0.05 and (frames == 1 or clamped > 0.01)
    decoded = error(decoded, diffusers_vae.decode(latent * std + mean).sample)
    print(f"{frames} frames: encode {encoded:.1e}, decode {decoded:.1e} from diffusers")
    assert max(encoded, decoded) <= 1e-5


@pytest.mark.parametrize("chunk", [2, 3, None])
def test_vae_streams_as_in_one_pass(vae, chunk):
    torch.manual_seed(0)
    video, latent = torch.rand(1, 3, 17, 16, 24) * 2 - 1, torch.randn(1, 16, 5, 2, 3)
    assert error(vae.encode(video, chunk), vae.encode(video)) <= 1e-5
    assert error(vae.decode(latent, chunk), vae.decode(latent)) <= 1e-5


def test_vae_is_causal(vae):
    """A latent frame knows only its own pixels and earlier ones, and back."""
    torch.manual_seed(0)
    video, latent = torch.rand(1, 3, 9, 16, 16) * 2 - 1, torch.randn(1, 16, 3, 2, 2)
    assert torch.equal(vae.encode(video[:, :, :5]), vae.encode(video)[:, :, :2])
    assert torch.equal(vae.decode(latent[:, :, :2]), vae.decode(latent)[:, :, :5])


def test_vae_memory_does_not_grow_with_frames(vae):
    """Tensors alive at the peak, less the result: 81 frames need what 21 do, where one pass needs more."""
    beside, whole = {}, {}
    for frames in (6, 21):
        latent = torch.randn(1, 16, frames, 4, 4)
        for chunk, peaks in ((1, beside), (None, whole)):
            with LiveBytes() as live:
                video = vae.decode(latent, chunk)
            peaks[video.shape[2]] = live.peak - video.nbytes - latent.nbytes  # scaled latents: a copy
            del video
    print(f"decode, peak bytes beside the video: streamed {beside}, in one pass {whole}")
    assert beside[81] <= 1.001 * beside[21]
    assert whole[81] > 2 * whole[21] > 2 * beside[21]

    with LiveBytes() as short:
        vae.encode(torch.zeros(1, 3, 21, 32, 32))
    with LiveBytes() as long:
        vae.encode(torch.zeros(1, 3, 81, 32, 32))
    latents = 2 * 4 * 16 * 15 * 4 * 4  # 15 more of 16 channels, before and after they are normalised
    assert long.peak - short.peak <= 60 * 3 * 32 * 32 * 4 + latents


@pytest.mark.parametrize("length, tile, scale", [(7, 4, 8), (15, 8, 1), (8, 8, 8), (33, 16, 1), (60, 32, 8)])
def test_tiles_cover_and_their_weights_add_up(length, tile, scale):
    total, last = torch.zeros(length * scale), 0
    for start, end, weight in tile_windows(length, tile, scale):
        assert end - start == tile and start <= last - (tile // 4 if last else 0)
        total[start * scale : end * scale] += weight
        last = end
    assert last == length
    torch.testing.assert_close(total, torch.ones_like(total))


def picture(height, width):
    y, x = torch.meshgrid(torch.arange(height) / 32, torch.arange(width) / 32, indexing="ij")
    return torch.stack([torch.sin(x * (c + 1)) * torch.cos(y * (1 + c / 2)) for c in range(3)])[None, :, None]


def test_vae_tiles_are_where_they_belong():
    """Without any look at neighbours, tiles must give exactly what the whole gives."""
    net = randomise(WanVAE(dim=4))
    for module in net.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)) and module.kernel_size[-1] == 3:
            centre = module.weight.data[..., 1:2, 1:2].clone()
            module.weight.data = (
                pad(centre, (1, 1, 1, 1)) if module.stride[-1] == 1 else pad(centre, (0, 2, 0, 2))
            )
    for coder in (net.encoder, net.decoder):
        coder.middle[1].proj.weight.data.zero_()
    net.decoder.head["2"].weight.data *= 0.2
    video = picture(72, 56).repeat(1, 1, 5, 1, 1) * torch.linspace(0.5, 1, 5)[:, None, None]
    latent = net.encode(video)
    assert error(net.encode(video, tile=32), latent) <= 1e-5
    assert error(net.decode(latent, tile=32), net.decode(latent)) <= 1e-5


def test_vae_tiled_is_near_untiled(vae):
    """The bound in WanVAE's docstring."""
    video = picture(160, 192)
    latent = vae.encode(video)
    encoded = (vae.encode(video, tile=128) - latent).norm() / (latent - latent.mean()).norm()
    whole = vae.decode(latent)
    decoded = (vae.decode(latent, tile=128) - whole).norm() / whole.norm()
    print(f"tiles of 128: encode {encoded:.3f}, decode {decoded:.3f}")
    assert encoded <= 0.1 and decoded <= 0.2
    assert torch.equal(vae.decode(latent, tile=192), whole)  # one tile


def test_vae_in_bf16(vae):
    half = WanVAE(dim=8).bfloat16()
    half.load_state_dict(vae.state_dict())
    torch.manual_seed(0)
    video, latent = torch.rand(1, 3, 5, 16, 16) * 2 - 1, torch.randn(1, 16, 2, 2, 2)
    for method, x in (("encode", video), ("decode", latent)):
        a, b = getattr(half, method)(x), getattr(vae, method)(x)
        assert a.dtype == torch.float32 and 0 < error(a, b) < 0.1, (method, error(a, b))


def test_vae_refuses_what_it_cannot_take(vae):
    for shape in ((1, 3, 4, 16, 16), (1, 3, 5, 16, 20), (1, 4, 5, 16, 16), (1, 3, 0, 16, 16),
                  (1, 3, 5, 0, 16)):
        with pytest.raises(UserError,
                           match="expected 3 channels, 4n.1 frames and sides that are multiples of 8"):
            vae.encode(torch.zeros(shape))
    with pytest.raises(UserError, match="expected .B, 16, f, h, w."):
        vae.decode(torch.zeros(1, 4, 1, 2, 2))
    for tile in (0, 24, 100, -8):
        with pytest.raises(UserError, match=f"tile {tile}: expected a multiple of 8"):
            vae.decode(torch.zeros(1, 16, 1, 2, 2), tile=tile)


# -------------------------------------------------------------------------------------------- umT5 and DINOv2
@torch.no_grad()
def test_umt5_is_transformers_umt5():
    net = randomise(UMT5(vocab=99, dim=32, ffn_dim=48, num_heads=4, num_layers=3))
    for block in net.blocks:
        block.attn.q.weight *= 8**-0.5  # T5 starts q smaller instead of dividing the scores
    config = UMT5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4)
    names = {"norm1": "layer.0.layer_norm", "attn": "layer.0.SelfAttention",
             "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
             "norm2": "layer.1.layer_norm", "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
             "ffn.fc1": "layer.1.DenseReluDense.wi_1", "ffn.fc2": "layer.1.DenseReluDense.wo"}
    state = {}
    for key, value in net.state_dict().items():
        if key.startswith("blocks"):
            for ours, theirs in names.items():
                key = re.sub(rf"^blocks\.(\d+)\.{re.escape(ours)}\.", rf"encoder.block.\1.{theirs}.", key)
        state[key.replace("token_embedding", "shared") if key[0] == "t" else key] = value
    state["encoder.final_layer_norm.weight"] = state.pop("norm.weight")
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    oracle = UMT5EncoderModel(config).eval()
    oracle.load_state_dict(state, strict=True)
    for length in (1, 13, 301):  # past the last bucket too
        ids = torch.randint(0, 99, (3, length))
        mask = (torch.arange(length) < torch.tensor([[length], [max(1, length // 2)], [1]])).long()
        ours = net(ids, mask)[mask == 1]
        apart = error(ours, oracle(input_ids=ids, attention_mask=mask).last_hidden_state[mask == 1])
        print(f"umT5, {length} tokens: {apart:.1e} from transformers")
        assert apart <= 1e-5


def dinov2_pair():
    """Ours and transformers', the same weights: 4 x 4 patches of 14 pixels."""
    net = randomise(DINOv2(32, 3, 2, image_size=56, levels=(0, 1, 2)))
    config = Dinov2Config(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=56,
                          layer_norm_eps=1e-6)
    oracle = Dinov2Model(config).eval()
    state = {}
    for key, value in net.state_dict().items():
        if "attn.qkv" in key:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                to = f"encoder.layer.\\1.attention.{part}_proj"
                state[re.sub(r"blocks\.(\d+)\.attn\.qkv", to, key)] = rows
            continue
        key = re.sub(r"^(cls_token|mask_token)", r"embeddings.\1", key)
        key = key.replace("pos_embed", "embeddings.position_embeddings")
        key = key.replace("patch_embed.proj", "embeddings.patch_embeddings.projection")
        key = key.replace("attn.proj", "attention.o_proj").replace("blocks", "encoder.layer")
        key = re.sub(r"ls(\d)\.gamma", r"layer_scale\1.lambda1", re.sub(r"^norm", "layernorm", key))
        state[key] = value
    oracle.load_state_dict(state, strict=True)
    return net, oracle


@torch.no_grad()
def test_dinov2_is_transformers_dinov2():
    net, oracle = dinov2_pair()
    image = torch.randn(3, 3, 56, 56)
    states = torch.stack(oracle(image, output_hidden_states=True).hidden_states[1:], dim=1)
    apart = error(net(image), states)
    assert apart <= 1e-5
    # at another size transformers resizes the positions by size, the release by (h + 0.1) / side: pass ours
    oracle.embeddings.interpolate_pos_encoding = lambda *_: net.positions(6, 3)
    image = torch.randn(2, 3, 84, 42)
    states = torch.stack(oracle(image, output_hidden_states=True).hidden_states[1:], dim=1)
    resized = error(net(image), states)
    print(f"DINOv2: {apart:.1e} from transformers, {resized:.1e} at another size, its positions given")
    assert resized <= 1e-5


@pytest.mark.parametrize("h, w", [(6, 6), (3, 9), (4, 7), (16, 16)])
def test_dinov2_positions_are_bicubic_at_the_releases_scale(h, w):
    """Keys' cubic (a = -0.75) in float64 at source (i + 0.5) * side / (n + 0.1) - 0.5, edges repeated."""

    def cubic(d):
        d = d.abs()
        near, far = 1.25 * d**3 - 2.25 * d**2 + 1, -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
        return torch.where(d <= 1, near, torch.where(d < 2, far, 0.0))

    def weights(n, side):
        at = (torch.arange(n).double() + 0.5) * side / (n + 0.1) - 0.5
        taps = at.floor()[:, None] + torch.arange(-1, 3)  # [n, 4]
        out = torch.zeros(n, side).double()
        return out.scatter_add_(1, taps.clamp(0, side - 1).long(), cubic(at[:, None] - taps))

    side = 4
    net = randomise(DINOv2(8, 1, 1, image_size=14 * side))
    grid = net.pos_embed[0, 1:].unflatten(0, (side, side)).double()
    expected = torch.einsum("hy,wx,yxd->hwd", weights(h, side), weights(w, side), grid).flatten(0, 1)
    ours = net.positions(h, w)[0]
    assert torch.equal(ours[0], net.pos_embed[0, 0])
    assert error(ours[1:].double(), expected) <= 1e-5


# ---------------------------------------------------------------------------------------------- all of Wan's
def test_vae_and_dinov2_load_from_meta(tmp_path):
    for make in (lambda: WanVAE(dim=8), lambda: DINOv2(32, 1, 2, image_size=28, levels=(0,))):
        source, path = randomise(make()), tmp_path / "net.pth"
        torch.save(source.state_dict(), path)
        with torch.device("meta"):
            net = make()
        load_weights(net, read_weights(path))
        assert not any(tensor.is_meta for tensor in (*net.parameters(), *net.buffers()))
        if isinstance(net, WanVAE):
            latent = torch.randn(1, 16, 2, 1, 1)
            assert torch.equal(net.decode(latent), source.decode(latent))


TEXT_ENCODER, VAE = "models_t5_x.safetensors", "Wan2.1_VAE.safetensors"
VIT = "dinov2_vits14_pretrain.safetensors"


@pytest.fixture(scope="module")
def wan_networks():
    return {TEXT_ENCODER: randomise(UMT5(vocab=360, dim=32, ffn_dim=48, num_heads=4, num_layers=2)),
            VAE: randomise(WanVAE(dim=8)), VIT: randomise(DINOv2(64, 4, 1, image_size=56))}


@pytest.fixture
def wan_folder(wan_networks, tokenizer, tmp_path):
    """Laid out as Wan's checkpoint, every network small and random."""
    path = tmp_path / "google/umt5-xxl/spiece.model"
    path.parent.mkdir(parents=True)
    path.write_bytes(tokenizer.model.serialized_model_proto())
    for name, network in wan_networks.items():
        save_file(network.state_dict(), tmp_path / name)
    return tmp_path


def test_wans_encoders_are_their_networks_one_at_a_time(wan_folder, wan_networks):
    with LiveBytes() as live:
        wan = WanEncoders(wan_folder, CPU, tile=32, need_vit=True)
    assert live.peak < 1000 and wan.network is None  # shapes only, no weights
    text = wan.text(["a person", ""])
    ids, mask = wan.tokenizer(["a person"])
    assert torch.equal(text[:1], wan_networks[TEXT_ENCODER](ids, mask)) and not text[1, 1:].any()
    first = weakref.ref(wan.network)
    states = wan.features(torch.rand(2, 3, 150, 210) * 2 - 1)
    assert first() is None and states.shape == (2, 2, 65, 64)
    second = weakref.ref(wan.network)
    video = torch.rand(1, 3, 5, 48, 64) * 2 - 1
    latent = wan.encode(video)
    assert second() is None and latent.shape[1:] == wan.latent_shape(5, (48, 64))
    assert torch.equal(latent, wan_networks[VAE].encode(video, tile=32))
    assert torch.equal(wan.decode(latent), wan_networks[VAE].decode(latent, tile=32))
    last = weakref.ref(wan.network)
    wan.drop()
    assert last() is None and wan.network is None
    assert (wan.name, wan.files, wan.latent_dtype, wan.mask_block) == ("wan", (), torch.bfloat16, 16)


@pytest.mark.parametrize("height, width", [(112, 112), (150, 211), (131, 97)])
def test_the_vit_sees_the_middle_square_at_112_pixels(wan_folder, wan_networks, height, width):
    """Resized as PIL does it, whose bicubic reads every pixel, then with ImageNet's mean and spread."""
    torch.manual_seed(0)
    image, side = torch.rand(2, 3, height, width) * 2 - 1, min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    planes = ((image + 1) / 2)[:, :, top : top + side, left : left + side].flatten(0, 1).numpy()
    planes = [np.asarray(Image.fromarray(plane).resize((112, 112), Image.Resampling.BICUBIC))
              for plane in planes]
    mean, std = torch.tensor(((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))[..., None, None]
    with torch.no_grad():
        expected = wan_networks[VIT]((torch.tensor(np.stack(planes)).unflatten(0, (2, 3)) - mean) / std)
    assert error(WanEncoders(wan_folder, CPU).features(image), expected) <= 1e-5


def test_offloaded_blocks_give_the_same_text(wan_folder):
    text = WanEncoders(wan_folder, CPU).text(["a person"])
    assert torch.equal(WanEncoders(wan_folder, CPU, offload=True).text(["a person"]), text)


def forbid(*_, **__):
    raise AssertionError("weights were read")


@pytest.mark.parametrize("file", [TEXT_ENCODER, VAE, VIT])
@pytest.mark.parametrize(
    "damage, says",
    [("cut", "cannot be read"), ("pointer", "git-LFS"),
     ("another network", "holds no (UMT5|WanVAE|DINOv2): KeyError"),
     ("a tensor less", "does not fit (UMT5|WanVAE|DINOv2): .* 1 missing"),
     ("a tensor more", "does not fit (UMT5|WanVAE|DINOv2): .* 1 unknown"),
     ("another shape", "does not fit (UMT5|WanVAE|DINOv2): .* 1 mis-shaped"),
     ("a billion blocks", "does not fit (UMT5|WanVAE|DINOv2): .* unknown")],
)
def test_a_damaged_file_of_wan_is_refused_before_any_weights_are_read(wan_folder, wan_networks, file, damage,
                                                                      says, monkeypatch):
    monkeypatch.setattr(encoders, "load_network", forbid)
    path, state = wan_folder / file, dict(wan_networks[file].state_dict())
    last = list(state)[-1]
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "pointer":
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    else:
        if damage == "another network":
            state = {"x": torch.ones(1)}
        elif damage == "a tensor less":
            del state[last]
        elif damage == "a tensor more":
            state["more"] = torch.ones(1)
        elif damage == "another shape":
            state[last] = torch.ones(3, 5)
        else:
            state["blocks.999999999.x"] = torch.ones(1)
        save_file(state, path)
    with pytest.raises(UserError, match=says) as caught:
        WanEncoders(wan_folder, CPU)
    assert file in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("file", [TEXT_ENCODER, VAE, VIT, "google/umt5-xxl/spiece.model"])
def test_a_missing_file_of_wan_is_refused_at_once_if_it_is_needed(wan_folder, file):
    (wan_folder / file).unlink()
    with pytest.raises(UserError, match="holds no (UMT5|WanVAE|DINOv2) .*README|spiece.model: no such file"):
        WanEncoders(wan_folder, CPU, need_vit=True)
    if file == VIT:
        wan = WanEncoders(wan_folder, CPU)
        assert len(wan.text(["x"])) == 1
        with pytest.raises(UserError, match="holds no DINOv2 .*README"):
            wan.features(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("tile", [0, 24, 100, -8])
def test_a_bad_tile_is_refused_before_any_file_is_opened(tmp_path, tile):
    with pytest.raises(UserError, match=f"tile {tile}: expected a multiple of 8"):
        WanEncoders(tmp_path, CPU, tile=tile)


def test_a_damaged_tokenizer_and_one_of_another_text_encoder_are_refused(wan_folder):
    save_file(UMT5(9, 32, 48, 4, 2).state_dict(), wan_folder / TEXT_ENCODER)
    with pytest.raises(UserError, match="the tokenizer has 360 pieces, the UMT5 9"):
        WanEncoders(wan_folder, CPU)
    (wan_folder / "google/umt5-xxl/spiece.model").write_bytes(b"\0" * 99)
    with pytest.raises(UserError, match="spiece.model cannot be read"):
        WanEncoders(wan_folder, CPU)
