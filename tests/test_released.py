"""Releases as people have them: the folders that diffusers saves, ComfyUI's repackaged files, transformers'
DINOv2. Each is made here by the library whose names it bears, small and random, and read as it is."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import sentencepiece
import torch
import transformers
from safetensors.torch import load_file, save_file

import data
import sample
import train
from model import DiTConfig
from networks import solvers
from networks.encoders import UMT5, DINOv2, WanEncoders, WanVAE, load_network
from networks.text import Tokenizer
from networks.weights import read_network
from support.checkpoints import find_checkpoint, read_meta
from support.script import UserError
from videos import toy
from videos.encode import read_settings
from videos.jobs import Job
from helpers import content, randomise

CPU = torch.device("cpu")
WORDS = ["a close-up of one person", "café 人 in two rooms; 3 cats, no dog", "x"]


def error(a, b):
    assert a.shape == b.shape and a.isfinite().all()
    return ((a - b).abs().max() / b.abs().max()).item()


def fields(message):
    """The fields of a Protocol Buffers message: [(number, int or bytes), ...]."""
    at, found = 0, []

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte, at, = message[at], at + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            found.append((number, varint()))
            continue
        size = {1: 8, 5: 4}[kind] if kind != 2 else varint()
        found.append((number, message[at : at + size]))
        at += size
    return found


@pytest.fixture(scope="session")
def pieces(tmp_path_factory):
    """A tiny sentencepiece model with umT5's special ids, a Unigram as umT5's is."""
    path = tmp_path_factory.mktemp("pieces") / "spiece.model"
    clips = toy.draw_clips(300, 1, "a") + toy.draw_clips(300, 2, "b")
    texts = [toy.caption(clip) for clip in clips] + WORDS * 9
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=file, vocab_size=150, model_type="unigram",
            hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2)
    return path


def their_tokenizer(pieces):
    model = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    normalizer = dict(fields(dict(fields(pieces.read_bytes()))[3]))
    vocab = [(model.id_to_piece(i), model.get_score(i)) for i in range(len(model))]
    return transformers.T5Tokenizer(vocab=vocab, _spm_precompiled_charsmap=normalizer[2], extra_ids=0)


def transformer(seed):
    torch.manual_seed(seed)
    net = diffusers.WanTransformer3DModel(num_attention_heads=1, attention_head_dim=128, text_dim=32,
                                          freq_dim=32, ffn_dim=64, num_layers=2).eval()
    for name, p in net.named_parameters():
        one = p.ndim == 1 or "scale_shift" in name
        p.data = torch.randn_like(p) / (1 if one else p[0].numel() ** 0.5)
    return net


@pytest.fixture(scope="session")
def pipelines(pieces):
    """diffusers' pipeline of Wan2.1 and that of Wan2.2's two experts."""
    torch.manual_seed(0)
    config = transformers.UMT5Config(vocab_size=len(Tokenizer(pieces).model), d_model=32, d_kv=8, d_ff=48,
                                     num_layers=2, num_heads=4)
    parts = dict(tokenizer=their_tokenizer(pieces),
                 text_encoder=randomise(transformers.UMT5EncoderModel(config)).eval(),
                 vae=randomise(diffusers.AutoencoderKLWan(base_dim=8, z_dim=16)).eval(),
                 scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction",
                                                             use_flow_sigmas=True, flow_shift=5.0))
    return {"2.1": diffusers.WanPipeline(transformer=transformer(1), **parts),
            "2.2": diffusers.WanPipeline(transformer=transformer(1), transformer_2=transformer(2),
                                         boundary_ratio=0.9, **parts)}


@pytest.fixture(scope="session")
def saved(pipelines, pieces, tmp_path_factory):
    """The folders that these pipelines save: 2.1 with its text encoder in shards and, as on the hub, with
    spiece.model, 2.2 as transformers saves it today, with tokenizer.json alone."""
    root = tmp_path_factory.mktemp("saved")
    for name, pipeline in pipelines.items():
        pipeline.save_pretrained(root / name)
    shutil.rmtree(root / "2.1" / "text_encoder")
    pipelines["2.1"].text_encoder.save_pretrained(root / "2.1" / "text_encoder", max_shard_size="20KB")
    shutil.copy(pieces, root / "2.1" / "tokenizer" / "spiece.model")
    return root


@pytest.mark.parametrize("name", ["2.1", "2.2"])
@torch.no_grad()
def test_the_whole_pipeline_is_diffusers_from_the_folder_that_it_saves(name, pipelines, saved):
    """Same prompts, noise, guidance and noise levels: the latter are Wan's own, handed over to diffusers."""
    found = sample.find(str(saved / name))
    model, encoders = sample.load(found, hardware=sample.Hardware("fp32"))
    assert found.kind == f"wan{name}" and found.boundary == (0.9 if name == "2.2" else 0)
    guide = (4.0, 3.0) if name == "2.2" else (5.0,)
    steps, shift, negative = 8, 5.0, "blurred, 人 no cats"
    recipe = sample.SAMPLE_RECIPES[found.kind] | dict(steps=steps, shift=shift, guide_text=guide,
                                                      negative=negative)
    pipeline, levels = pipelines[name], solvers.schedule(steps, shift, "unipc")
    assert len({bool(t < 1000 * found.boundary) for t in levels[1]}) == len(found.networks)
    set_timesteps = type(pipeline.scheduler).set_timesteps

    def handed_over(steps, device=None):
        set_timesteps(pipeline.scheduler, steps, device=device)
        pipeline.scheduler.sigmas, pipeline.scheduler.timesteps = levels[0].float(), levels[1].long()

    pipeline.scheduler.set_timesteps = handed_over
    for seed, prompt in enumerate(WORDS):
        ours, = sample.generate(model, encoders, [Job(prompt, None, seed, (32, 48))], recipe, 5)
        noise = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(seed))
        theirs = pipeline(prompt=prompt, negative_prompt=negative, height=32, width=48, num_frames=5,
                          num_inference_steps=steps, guidance_scale=guide[0], latents=noise,
                          guidance_scale_2=guide[-1] if name == "2.2" else None, output_type="pt").frames[0]
        apart = float((ours.transpose(0, 1) / 2 + 0.5 - theirs).abs().max())
        print(f"Wan{name}, {prompt!r}: {apart:.1e} of 1 from diffusers")
        assert apart < 1e-3 and ours.std() > 0.1
    del pipeline.scheduler.set_timesteps


@torch.no_grad()
def test_each_network_from_its_saved_files_is_that_librarys(pipelines, saved):
    encoders, pipeline = WanEncoders(saved / "2.1", CPU), pipelines["2.1"]
    assert len(encoders.paths[UMT5]) > 2  # shards
    video = torch.rand(2, 3, 5, 32, 48) * 2 - 1
    mean, std = (torch.tensor(getattr(pipeline.vae.config, name))[:, None, None, None]
                 for name in ("latents_mean", "latents_std"))
    latent = (pipeline.vae.encode(video).latent_dist.mode() - mean) / std
    assert error(encoders.encode(video), latent) <= 1e-5
    ours, theirs = encoders.decode(latent), pipeline.vae.decode(latent * std + mean).sample.clamp(-1, 1)
    assert error(ours, theirs) <= 1e-5
    for text in WORDS:
        ids, mask = encoders.tokenizer([text])
        tokens = pipeline.text_encoder(ids, mask).last_hidden_state
        assert error(encoders.text([text]), tokens) <= 1e-5


@pytest.mark.parametrize("text", [*WORDS, "", "A  B", "ﬁve ½ ＡＢ", "no such 語 letters ж", "x" * 300])
def test_a_tokenizer_json_cuts_as_its_own_library_and_as_the_model_it_was_made_of(text, saved, pieces):
    file = saved / "2.2" / "tokenizer" / "tokenizer.json"
    assert file.is_file() and not file.with_name("spiece.model").exists()
    ours, original = Tokenizer(file), Tokenizer(pieces)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file))
    assert torch.equal(ours([text])[0], original([text])[0])
    assert ours([text])[0][0].tolist() == theirs(" ".join(text.split()).strip() or "")["input_ids"]


def comfy(saved, folder, pieces, prefix="model.diffusion_model."):
    """ComfyUI's files of what diffusers saved: Wan's names for transformer and VAE, transformers' for umT5,
    which holds the tokenizer too."""
    folder.mkdir()
    text = read_network(sorted((saved / "text_encoder").glob("*.safetensors")))
    tensors = {name: text.get(name) for name in text.shapes}
    tensors["spiece_model"] = torch.frombuffer(bytearray(pieces.read_bytes()), dtype=torch.uint8)
    save_file(tensors, folder / "umt5_xxl_fp16.safetensors")
    vae = load_network(WanVAE, sorted((saved / "vae").glob("*.safetensors")), None, CPU)
    save_file(vae.state_dict(), folder / "wan_2.1_vae.safetensors")
    for part, name in (("transformer", "wan_high_noise.safetensors"),
                       ("transformer_2", "Wan-LowNoise.safetensors")):
        if (saved / part).is_dir():
            name = name if (saved / "transformer_2").is_dir() else "wan2.1_t2v_1.3B_fp16.safetensors"
            file = sample.on_meta(saved / part)
            sample.load_wan(file, saved / part)
            save_file({prefix + key: value for key, value in file.state_dict().items()
                       if not key.startswith(("proxies", "mfi."))}, folder / name)
    return folder


def in_folders(folder):
    for name, sub in (("umt5*", "text_encoders"), ("wan_2.1_vae*", "vae"), ("*an*", "diffusion_models")):
        (folder / sub).mkdir()
        for file in [*folder.glob(name)]:
            if file.is_file():
                file.rename(folder / sub / file.name)
    return folder


@pytest.mark.parametrize("name", ["2.1", "2.2"])
@pytest.mark.parametrize("layout", ["flat", "folders", "file"])
def test_comfyuis_files_make_the_same_video(name, layout, saved, pieces, tmp_path):
    prefix = "" if layout == "flat" else "model.diffusion_model."
    folder = comfy(saved / name, tmp_path / "models", pieces, prefix)
    if layout != "flat":
        in_folders(folder)
    ckpt = folder
    if layout == "file" and name == "2.1":
        ckpt = folder / "diffusion_models" / "wan2.1_t2v_1.3B_fp16.safetensors"
    elif layout == "file":
        ckpt = folder / "diffusion_models"
    jobs = [Job(WORDS[0], None, 0, (32, 48))]
    videos = []
    for path in (saved / name, ckpt):
        found = sample.find(str(path))
        recipe = sample.SAMPLE_RECIPES[found.kind] | {"steps": 3}
        found.boundary = found.boundary and 0.875
        videos += sample.generate(*sample.load(found, hardware=sample.Hardware("fp32")), jobs, recipe, 5)
    assert found.kind == f"wan{name}" and torch.equal(*videos)


@pytest.mark.parametrize("prefix", ["", "dinov2."])
@pytest.mark.parametrize("old", [False, True])
@torch.no_grad()
def test_dinov2_with_the_names_of_transformers(old, prefix, saved, tmp_path):
    """As facebook/dinov2-* have it, the names of before transformers 5, and as transformers saves it now."""
    config = transformers.Dinov2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=1,
                                       image_size=56, layer_norm_eps=1e-6)
    oracle = randomise(transformers.Dinov2Model(config)).eval()
    shutil.copytree(saved / "2.1", tmp_path / "wan")
    oracle.save_pretrained(tmp_path / "wan" / "dinov2-small")
    file = tmp_path / "wan" / "dinov2-small" / "model.safetensors"
    renames = {"attention.q_proj": "attention.attention.query", "attention.k_proj": "attention.attention.key",
               "attention.v_proj": "attention.attention.value", "attention.o_proj": "attention.output.dense"}
    tensors = {}
    for name, tensor in load_file(file).items():
        for new, released in renames.items():
            name = name.replace(*((new, released) if old else (released, new)))
        tensors[prefix + name] = tensor
    save_file(tensors, file)
    encoders = WanEncoders(tmp_path / "wan", CPU, need_vit=True)
    assert encoders.vit_shape == [2, 64]
    image = torch.randn(2, 3, 56, 56)
    states = torch.stack(oracle(image, output_hidden_states=True).hidden_states[1:], dim=1)
    assert error(encoders.load(DINOv2)(image), states) <= 1e-5


# ------------------------------------------------------------------------------- what is in which folder
@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """A tiny set of clips with its manifest."""
    folder = tmp_path_factory.mktemp("clips")
    toy.main(["--out", str(folder), "--size", "48", "--frames", "5", "--fps", "16"])
    return folder


@pytest.fixture
def small(monkeypatch, tmp_path):
    """--config small of these sizes, in an empty working directory."""
    config = DiTConfig(dim=128, ffn_dim=64, num_heads=1, num_layers=2, text_dim=32, freq_dim=32)
    monkeypatch.setitem(train.CONFIGS, "small", config)
    monkeypatch.setitem(train.TRAIN_RECIPES, "small", train.TRAIN_RECIPES["tiny"] | {"batch": 2})
    monkeypatch.setitem(toy.WORLDS, "small", toy.WORLDS["1.3b"])
    monkeypatch.chdir(tmp_path)
    return ["--config", "small", "--no-samples", "--stage", "1", "--steps", "1", "--precision", "fp32"]


def encode(clips, wan, out, *flags):
    data.main(["encode", "--data", str(clips), "--wan", str(wan), "--out", str(out), "--size", "32x48",
               "--frames", "5", "--precision", "fp32", *flags])
    return Path(out)


@pytest.mark.parametrize("layout", ["diffusers", "comfy"])
@pytest.mark.parametrize("name, flags", [
    ("2.1", []), ("2.2", ["--expert", "low"]), ("2.1", ["--train", "lora"])])
def test_encode_train_and_sample_from_a_folder_as_it_is(layout, name, flags, saved, pieces, clips, small,
                                                        tmp_path):
    wan = saved / name
    if layout == "comfy":
        wan = in_folders(comfy(wan, tmp_path / "models", pieces))
    one = encode(clips, wan, tmp_path / "set")
    train.main([*small, "--wan", str(wan), "--data", str(one), "--out", "run/low_noise_model", *flags])
    meta = read_meta(find_checkpoint("run/low_noise_model"))
    assert meta["wan"] == str(wan)
    if not flags:
        where = "run/low_noise_model"
        sample.main(["--ckpt", where, "--prompt", "x", "--frames", "5", "--size", "32x48", "--steps", "1",
                     "--out", str(tmp_path / "v")])
        assert (tmp_path / "v.mp4").is_file()


def test_an_encoded_set_knows_its_networks_by_their_content(saved, clips, tmp_path):
    """Another VAE of the same size and name is refused, the same under another name is not. A set of before,
    which knows sizes only, goes on as it is."""
    shutil.copytree(saved / "2.1", tmp_path / "wan")
    folder = encode(clips, tmp_path / "wan", tmp_path / "set")
    before = content(folder)
    vae, = (tmp_path / "wan" / "vae").glob("*.safetensors")
    vae.rename(vae.with_name("renamed.safetensors"))
    vae = vae.with_name("renamed.safetensors")
    encode(clips, tmp_path / "wan", folder)
    assert content(folder) == before
    tensors = load_file(vae)
    save_file(tensors | {"quant_conv.bias": tensors["quant_conv.bias"] + 1}, vae)
    with pytest.raises(UserError, match="was encoded with other settings .networks .* another --out"):
        encode(clips, tmp_path / "wan", folder)
    assert content(folder) == before
    settings = json.loads((folder / "settings.json").read_text())
    settings["networks"] = WanEncoders(tmp_path / "wan", CPU).sizes()
    old = tmp_path / "old"
    old.mkdir()
    (old / "settings.json").write_text(json.dumps(settings))
    encode(clips, tmp_path / "wan", old)
    made = content(old)
    encode(clips, tmp_path / "wan", old)
    assert content(old) == made and read_settings(old)["networks"] == settings["networks"]


@pytest.mark.parametrize("train_what", ["all", "lora"])
def test_another_release_does_not_take_over_a_run(train_what, saved, clips, small, tmp_path):
    """Nor one that was put in the same place; a copy of the same is the same, and a run of before, which
    does not know its release, goes on."""
    for name in ("one", "copy", "other"):
        shutil.copytree(saved / "2.1", name)
    file, = Path("other/transformer").glob("*.safetensors")
    tensors = load_file(file)
    save_file(tensors | {"proj_out.bias": tensors["proj_out.bias"] + 1}, file)
    folder = encode(clips, "one", "set")
    command = [*small, "--data", str(folder), "--out", "run", "--train", train_what]
    train.main([*command, "--wan", "one"])
    for wan in ("one", "copy"):
        train.main([*command, "--wan", wan, "--resume"])
    says = "/one, and --wan .*/other holds"
    if train_what == "all":
        says = "started from other weights.*/one, not other"
    with pytest.raises(UserError, match=says):
        train.main([*command, "--wan", "other", "--resume"])
    step = find_checkpoint("run")
    make = ["--ckpt", "run", "--prompt", "x", "--frames", "5", "--size", "32x48", "--steps", "1"]
    make += ["--out", "v"]
    sample.main(make)
    shutil.copy(file, Path("one/transformer") / file.name)
    if train_what != "all":
        with pytest.raises(UserError, match="one, the frozen network .* is another one now: .* put the old"):
            sample.main(make)
    with pytest.raises(UserError, match="started from other weights|is another one now"):
        train.main([*command, "--wan", "one", "--resume"])
    meta = json.loads((step / "checkpoint.json").read_text())  # as before 2026-12-01
    meta["parent"] = None
    meta.get("base", {}).pop("content", None)
    (step / "checkpoint.json").write_text(json.dumps(meta))
    sample.main(make)
    train.main([*command, "--wan", "one", "--resume"])


# ------------------------------------------------------------------------------ further, as people have them
def resave(pattern, suffix=None, dtype=None, rename=lambda name: name, **more):
    """Write a folder's weight file anew, perhaps as torch.save does."""
    def change(folder):
        path, = folder.glob(pattern)
        tensors = {rename(name): t.to(dtype or t.dtype) for name, t in load_file(path).items()} | more
        path.unlink()
        if suffix in (None, ".safetensors"):
            save_file(tensors, path)
        else:
            torch.save(tensors, path.with_name(path.name.replace(".safetensors", suffix)))
    return change


def only_bin(folder):
    """A repository of before safetensors, its umT5 in shards with their index."""
    for index in folder.glob("*/*.index.json"):
        weight_map = json.loads(index.read_text())["weight_map"]
        names = {name: file.replace(".safetensors", ".bin") for name, file in weight_map.items()}
        index.with_name("pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
        index.unlink()
    for file in folder.glob("*/*.safetensors"):
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()


def cache_of_the_hub(folder):
    """Every file a link into a folder of blobs whose names say nothing."""
    (folder / "blobs").mkdir()
    for n, file in enumerate([f for f in folder.glob("*/*") if f.parent.name != "blobs"]):
        file.rename(folder / "blobs" / f"{n:064x}")
        file.symlink_to(Path("..") / "blobs" / f"{n:064x}")


def shards_without_index(folder):
    for index in folder.glob("text_encoder/*.index.json"):
        index.unlink()


def pointers(folder):
    for file in folder.glob("*/*.safetensors"):
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")


def variant(folder):
    """Both precisions of one network."""
    file, = folder.glob("transformer/*.safetensors")
    save_file({name: t.half() for name, t in load_file(file).items()},
              file.with_name("diffusion_pytorch_model.fp16.safetensors"))


def gguf(folder):
    shutil.rmtree(folder / "text_encoder")
    (folder / "text_encoder").mkdir()
    (folder / "text_encoder" / "umt5-xxl-encoder-Q8_0.gguf").write_bytes(b"GGUF" + bytes(99))


def unrelated(folder):
    """Other models of a collection, one of them cut short: none of this release's."""
    (folder / "loras").mkdir()
    save_file({"blocks.0.self_attn.q.lora_A.weight": torch.ones(1)}, folder / "loras" / "x.safetensors")
    (folder / "loras" / "cut.safetensors").write_bytes(b"\x10")
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    save_file(vae.state_dict(), folder / "loras" / "sdxl_vae.safetensors")
    t5 = transformers.T5EncoderModel(transformers.T5Config(vocab_size=150, d_model=32, d_kv=8, d_ff=48,
                                                           num_layers=2, num_heads=4,
                                                           feed_forward_proj="gated-gelu"))
    save_file({k: v for k, v in t5.state_dict().items() if "embed_tokens" not in k},
              folder / "loras" / "t5xxl_fp16.safetensors")


def only_t5(folder):
    unrelated(folder)
    shutil.rmtree(folder / "text_encoder")


def vae_of_5b(folder):
    vae = diffusers.AutoencoderKLWan(base_dim=8, z_dim=48, is_residual=True, in_channels=12, out_channels=12,
                                     decoder_base_dim=8, patch_size=2)
    file, = folder.glob("vae/*.safetensors")
    save_file(vae.state_dict(), file)


def all_in_one(folder):
    file, = folder.glob("transformer/*.safetensors")
    tensors = {"model.diffusion_model." + name: t for name, t in load_file(file).items()}
    vae, = folder.glob("vae/*.safetensors")
    save_file(tensors | {"vae." + name: t for name, t in load_file(vae).items()}, file)


def other_tokenizer(folder):
    """T5's 32,000 pieces for umT5's vocabulary."""
    shutil.rmtree(folder / "text_encoder")
    config = transformers.UMT5Config(vocab_size=2000, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    transformers.UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")


SAME = None  # the same video, bit for bit
FURTHER = {
    "only .bin": (only_bin, SAME), "the hub's cache": (cache_of_the_hub, SAME),
    "shards without an index": (shards_without_index, SAME), "among other models": (unrelated, SAME),
    "DataParallel": (resave("transformer/*.safetensors", ".pt", rename=lambda name: "module." + name), SAME),
    "Kijai's VAE": (resave("vae/*.safetensors", rename=lambda name: "model." + name), SAME),
    "a VAE in .pt": (resave("vae/*.safetensors", ".pt"), SAME),
    "git-lfs pointers": (pointers, "git-LFS pointer, not the weights"),
    "two precisions": (variant, r"holds 2 Wan transformers .diffusion_pytorch_model.fp16.safetensors, diff"),
    "GGUF": (gguf, "umt5-xxl-encoder-Q8_0.gguf is a GGUF file, quantised: take the .safetensors in fp16"),
    "another T5": (only_t5, r"t5xxl_fp16.safetensors does not fit UMT5: .*missing \('blocks.1.pos_embedding"),
    "the VAE of 5B": (vae_of_5b, "is a VAE of 48 channels, such as Wan2.2's for its 5B; expected Wan2.1's"),
    "all in one": (all_in_one, "does not fit HarmoView: .* unknown .'vae."),
    "another tokenizer": (other_tokenizer, "the tokenizer has ..+ pieces, the UMT5 2000"),
    "an fp8 file": (resave("transformer/*.safetensors", dtype=torch.float8_e4m3fn), "quantised .* fp8.*fp16"),
    "a NaN": (resave("vae/*.safetensors", **{"quant_conv.bias": torch.full((32,), float("nan"))}),
              "vae/diffusion_pytorch_model.safetensors: 'conv1.bias' is not finite"),
}


@pytest.mark.parametrize("what", FURTHER)
def test_further_folders_are_read_or_refused_in_one_line(what, saved, tmp_path):
    change, says = FURTHER[what]
    shutil.copytree(saved / "2.1", tmp_path / "wan")
    change(tmp_path / "wan")

    def make(folder):
        found = sample.find(str(folder))
        recipe = sample.SAMPLE_RECIPES[found.kind] | {"steps": 2}
        model, encoders = sample.load(found, hardware=sample.Hardware("fp32"))
        return sample.generate(model, encoders, [Job(WORDS[0], None, 0, (32, 48))], recipe, 5)[0]

    if says is SAME:
        assert torch.equal(make(tmp_path / "wan"), make(saved / "2.1"))
        return
    with pytest.raises(UserError, match=says) as caught:
        make(tmp_path / "wan")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_release_in_half_precision_is_near(dtype, saved, tmp_path):
    shutil.copytree(saved / "2.1", tmp_path / "wan")
    for file in (tmp_path / "wan").glob("*/*.safetensors"):
        save_file({name: t.to(dtype) for name, t in load_file(file).items()}, file)
    text = [WanEncoders(folder, CPU).text(WORDS) for folder in (tmp_path / "wan", saved / "2.1")]
    assert 0 < error(*text) < 0.05


@pytest.mark.parametrize("layout, part", [
    ("diffusers", "transformer_2"), ("comfy", "diffusion_models/wan_high_noise.safetensors")])
def test_one_of_two_experts_alone_makes_no_video(layout, part, saved, pieces, tmp_path):
    folder = saved / "2.2"
    if layout == "comfy":
        folder = in_folders(comfy(folder, tmp_path / "models", pieces))
    with pytest.raises(UserError, match="is one of Wan2.2's two experts: give the folder that holds both"):
        sample.find(str(folder / part))
    for expert, other in ((0, "high"), (1, "low")):
        both = sample.find(str(folder)).networks
        assert train.choose_expert(str(folder), other) == both[expert]
        assert train.choose_expert(both[expert], other) == both[expert]
    with pytest.raises(UserError, match="that is the other expert"):
        train.choose_expert(both[1], "high")


@pytest.mark.parametrize("boundary, expected", [(0.9, 0.9), (None, 0.875), ("x", 0.875), (7, 0.875)])
def test_the_boundary_of_two_experts_is_the_releases(boundary, expected, saved, tmp_path):
    shutil.copytree(saved / "2.2", tmp_path / "wan")
    index = tmp_path / "wan" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"boundary_ratio": boundary}))
    assert sample.find(str(tmp_path / "wan")).boundary == expected
    index.write_text("{")
    assert sample.find(str(tmp_path / "wan")).boundary == 0.875
