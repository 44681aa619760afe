"""Several processes, as torchrun starts them: on the GPUs of one or more machines, or on a CPU."""
import contextlib
import os
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from checkpoint import UserError

# its environment variables, and their values without it
TORCHRUN = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
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
        try:
            rank, size, local, local_size = (int(os.environ.get(name, TORCHRUN[name])) for name in TORCHRUN)
            if not (0 <= rank < size and 0 <= local < local_size <= size):
                raise ValueError(f"process {rank} of {size}, here {local} of {local_size}")
        except ValueError as error:
            raise UserError(f"{', '.join(TORCHRUN)} do not fit ({error}): "
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

    def all(self, flag):
        """Is it true on every process. All of them must ask."""
        flag = torch.tensor(float(flag), device=self.device)
        if self.size > 1:
            dist.all_reduce(flag, dist.ReduceOp.MIN)
        return bool(flag)

    def agree(self, value):
        """Process 0's value, on every process."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]


# ------------------------------------------------------------------------------------------ DDP and sharding
def shard(model, world, bf16):
    """FSDP2: every process holds its part of each float32 weight, and so of its gradient, its average and the
    optimizer's state. A block's weights are gathered when it computes, in bf16 if asked; gradients are
    averaged in float32."""
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32, cast_forward_inputs=False)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)


def replicate(model, world):
    """DDP: every process holds all of the model. Returns what is to be called in its place, so that no saved
    name carries its prefix."""
    if world.size == 1:
        return model
    # a step's views leave some proxies or MFI unused, the same on all processes
    return DistributedDataParallel(model, find_unused_parameters=True)


@contextlib.contextmanager
def synchronized(network, last):
    """For a backward: gradients are averaged over the processes in a step's last one only."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(last)
    wait = isinstance(network, DistributedDataParallel) and not last
    with network.no_sync() if wait else contextlib.nullcontext():
        yield


def local(tensor):
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor):
    """All of a tensor, gathered where it is sharded; then every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_state(model, optimizers, ema):
    """What a sharded checkpoint holds, as torch.distributed.checkpoint takes it."""
    for optimizer in optimizers:  # AdamW makes its state at a weight's first gradient, MFI's may come late
        for group in optimizer.param_groups:
            for p in group["params"]:
                if not optimizer.state[p]:
                    optimizer.state[p].update(step=torch.zeros((), device=p.device),
                                              exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    weights, states = get_state_dict(model, optimizers, options=OPTIONS)
    return {"model": weights, "optimizer": states, "ema": ema}


OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


def save_shards(folder, model, optimizers, ema):
    """Every process writes its part into one folder, which all of them must see."""
    dcp.save(sharded_state(model, optimizers, ema), checkpoint_id=folder)


def load_shards(folder, model, optimizers, ema):
    """What save_shards wrote, by any number of processes."""
    state = sharded_state(model, optimizers, ema)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizer"],
                   options=OPTIONS)
