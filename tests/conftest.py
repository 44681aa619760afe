"""What the tests share: the repository's root on the path, and one run of all stages on the tiny preset."""

import contextlib
import importlib
import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tqdm import tqdm

# before anything imports triton: then the fused kernels run on a CPU
os.environ.setdefault("TRITON_INTERPRET", "1")
# before anything imports torch: then a script computes the same bits in this process and in its own
os.environ["OMP_NUM_THREADS"] = "1"
# float32 on a GPU is then float32, not TF32, as the tolerances expect
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
# tqdm's own lock is shared with forked processes, and one that a test kills may hold it for ever
tqdm.set_lock(threading.RLock())
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


TIMEOUT = 600  # seconds for another process: far more than it needs, so that only one that hangs fails


def torchrun(processes, *command, cwd, restarts=0):
    """-> exit status, stdout, and stderr, to which torchrun adds a traceback of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes,
               "--max-restarts", restarts, *command]
    with subprocess.Popen([str(part) for part in command], cwd=cwd, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        try:
            out, errors = process.communicate(timeout=TIMEOUT)
        finally:
            process.terminate()  # where it hangs: torchrun ends its processes too
    return process.returncode, out, errors


def run(*command, cwd, fails=False):
    """Run a script of the repository in `cwd`; where it must fail, return its one line of error."""
    command = [sys.executable, *(str(c) for c in command)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT)
    if not fails:
        assert done.returncode == 0, done.stderr
        return done.stdout
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def call(script, *arguments, cwd, **options):
    """`python SCRIPT` in `cwd`, but in this process, as importing torch takes seconds -> what it printed."""
    arguments = [str(a) for a in arguments]
    before = sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        sys.argv = [str(ROOT / script), *arguments]
        with contextlib.chdir(cwd), contextlib.redirect_stdout(io.StringIO()) as said:
            importlib.import_module(Path(script).stem).main(arguments, **options)
    finally:
        sys.argv = before
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return said.getvalue()


@pytest.fixture
def no_gpu(monkeypatch):
    """Hide the GPUs, which a forked process cannot use once this one has."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with cache/ and out/tiny/ as `python train.py --config tiny` leaves them, all four stages."""
    folder = tmp_path_factory.mktemp("tiny")
    call("train.py", "--config", "tiny", "--no-samples", cwd=folder)
    return folder


WAN_SMALL = dict(text_dim=32, freq_dim=32, vit_dim=64, vit_levels=2)  # what the folder below has of its own


@pytest.fixture(scope="session")
def wan(tmp_path_factory):
    """Two folders laid out like Wan's checkpoints, 2.1 and 2.2, with every network small and random."""
    import safetensors.torch
    import torch

    from videos import toy
    from networks.encoders import UMT5, DINOv2, WanVAE
    from networks.lora import NEW_PREFIXES
    from model import DiTConfig, HarmoView

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("wan")
    for name, parts in (("2.1", ["."]), ("2.2", ["high_noise_model", "low_noise_model"])):
        folder = root / name
        (folder / "google/umt5-xxl").mkdir(parents=True)
        toy.train_tokenizer(folder / "google/umt5-xxl/spiece.model")
        networks = {
            "models_t5_umt5-xxl-enc-bf16.pth": UMT5(vocab=360, dim=32, ffn_dim=48, num_heads=4, num_layers=2),
            "Wan2.1_VAE.pth": WanVAE(dim=8),
            "dinov2_vits14_pretrain.pth": DINOv2(dim=64, num_layers=2, num_heads=1, image_size=56),
        }
        for file, network in networks.items():
            torch.save(network.state_dict(), folder / file)
        for part in parts:
            network = HarmoView(DiTConfig(dim=128, ffn_dim=64, num_heads=1, num_layers=2, **WAN_SMALL))
            tensors = {k: torch.randn_like(v) / v.shape[-1] ** 0.5 for k, v in network.state_dict().items()}
            (folder / part).mkdir(exist_ok=True)
            safetensors.torch.save_file(
                {k: v for k, v in tensors.items() if not k.startswith(NEW_PREFIXES)},
                folder / part / "diffusion_pytorch_model.safetensors",
            )
    return root
