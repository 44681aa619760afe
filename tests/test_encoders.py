import pytest
import torch

import data
from encoders import UMT5, DINOv2, RelativeBias, Tokenizer, ToyCodec


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "spiece.model"
    data.train_tokenizer(path)
    return Tokenizer(path)


def test_tokenizer_cleans_ends_and_pads(tokenizer):
    ids, mask = tokenizer(["a close-up of  one\nperson &amp;amp; a &lt;tree", "", "a close-up"])
    assert ids.shape == mask.shape and mask.sum(1).tolist() == [ids.shape[1], 1, int(mask[2].sum())]
    assert all(row[n - 1] == tokenizer.model.eos_id() == 1 for row, n in zip(ids, mask.sum(1), strict=True))
    assert not ids[mask == 0].any()
    assert tokenizer.model.decode(ids[2, : mask[2].sum() - 1].tolist()) == "a close-up"
    assert torch.equal(tokenizer(["a  close-up "])[0], tokenizer(["a close-up"])[0])
    cut, _ = Tokenizer.__call__(
        type("T", (), {"model": tokenizer.model, "max_len": 4})(), ["a close-up of one person"]
    )
    assert cut.shape == (1, 4) and cut[0, -1] == 1


def test_every_toy_caption_survives_the_tokenizer(tokenizer):
    captions = [data.caption(c) for people in (1, 2) for c in data.toy_clips(50, people, "test")]
    ids, mask = tokenizer(captions)
    assert not (ids[mask == 1] == tokenizer.model.unk_id()).any()
    assert [
        tokenizer.model.decode(row[: n - 1].tolist()) for row, n in zip(ids, mask.sum(1), strict=True)
    ] == captions


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


def test_toy_codec_is_exactly_invertible():
    codec, video = ToyCodec(), torch.randn(2, 3, 5, 16, 24)
    latent = codec.encode(video)
    assert latent.shape == (2, 48, 5, 4, 6) and torch.equal(codec.decode(latent), video)
    assert torch.equal(codec.encode(video[:, :, 2:3])[:, :, 0], latent[:, :, 2])  # every frame is its own


def test_the_toys_frozen_networks_are_the_same_everywhere(tmp_path):
    data.train_tokenizer(tmp_path / "spiece.model")
    torch.manual_seed(1)
    a = data.ToyEncoders(tmp_path, 32)
    torch.manual_seed(2)
    b = data.ToyEncoders(tmp_path, 32)
    rows = a.text(["a close-up of one person", ""])
    assert torch.equal(rows, b.text(["a close-up of one person", ""]))
    assert rows.shape[::2] == (2, data.TEXT_DIM) and not rows[1, 1:].any()
    image = torch.zeros(1, 3, 32, 32)
    assert torch.equal(a.features(image), b.features(image))
