"""Small things that several test files use."""

import socket

import av
import numpy as np
import torch


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
