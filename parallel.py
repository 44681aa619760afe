"""Several processes, as torchrun starts them: on the GPUs of one or more machines, or on a CPU."""
import os
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist

from checkpoint import UserError

# CPU cores that this process may use
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@dataclass(frozen=True)
class World:
    """This process among the others."""
    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls):
        """Under torchrun the process group of its environment (nccl on GPUs, gloo else), alone without it.
        On one machine with fewer GPUs than processes, those without a GPU leave quietly, so that the same
        command serves a CPU and any number of GPUs."""
        defaults = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        try:
            rank, size, local, local_size = (int(os.environ.get(name, defaults[name])) for name in defaults)
            if not (0 <= rank < size and 0 <= local < local_size <= size):
                raise ValueError(f"process {rank} of {size}, here {local} of {local_size}")
        except ValueError as error:
            raise UserError(f"{', '.join(defaults)} do not fit ({error}): "
                            "unset them, or start with torchrun") from None
        gpus = torch.cuda.device_count()
        if gpus and local_size > gpus:
            if size > local_size:
                raise UserError(f"{local_size} processes on a machine with {gpus} GPU(s): "
                                f"give torchrun --nproc-per-node {gpus}")
            if local >= gpus:
                sys.exit(0)
            if rank == 0:
                print(f"{gpus} of {size} processes train: each needs a GPU of its own")
            size = gpus
        device = torch.device("cuda", local) if gpus else torch.device("cpu")
        if gpus:
            torch.cuda.set_device(device)
        elif size > 1 and os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun's default, for any machine
            torch.set_num_threads(max(1, CORES // local_size))
        if size > 1:
            dist.init_process_group("nccl" if gpus else "gloo", rank=rank, world_size=size)
        return cls(rank, size, device)

    def barrier(self):
        if self.size > 1:
            dist.barrier()
