"""Small things that several test files use."""

import errno
import multiprocessing
import os
import signal
import socket
import time
import weakref

import av
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def one_line(error):
    """Is what pytest.raises caught a message of one short line."""
    return "\n" not in str(error.value) and len(str(error.value)) < 500


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def content(folder):
    """Every file below a folder, but for the lock's, which holds the number of a process."""
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*") if path.is_file() and path.name != ".cache-lock"}


def write_sound(path):
    """A file of a second of silence (AAC), without pictures."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


@torch.no_grad()
def randomise(net, seed=0):
    """Every parameter away from its starting value, at sizes that keep activations near one."""
    torch.manual_seed(seed)
    for name, p in net.named_parameters():
        if p.ndim > 1 and not name.endswith("gamma"):
            p.copy_(torch.randn_like(p) / p[0].numel() ** 0.5)
        else:
            p.copy_((0 if name.endswith("bias") else 1) + 0.1 * torch.randn_like(p))
    return net.eval()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside that are still alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, set()

    def freed(self, key, size):
        self.now -= size
        self.seen.discard(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(out)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.seen and storage.device.type == "cpu":
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return out


def names(folder):
    """What lies below a folder, but for its lock."""
    paths = [path for path in folder.rglob("*") if path.name not in (".lock", ".cache-lock")]
    return sorted(str(path.relative_to(folder)) for path in paths)


def fork(function, *arguments):
    """Run it in a process of its own, which shares nothing with this one."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "nothing happened for 20 seconds"
        time.sleep(0.01)


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.join()


FULL_DISK = OSError(errno.ENOSPC, "No space left on device")


def hang():
    time.sleep(60)
