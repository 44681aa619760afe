"""Several processes, as torchrun starts them: on the GPUs of one or more machines, or on a CPU."""
import functools
import os
import sys
import time
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from support.script import UserError

# its environment variables, and their values without it
TORCHRUN = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
# CPU cores that this process may use
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

PATIENCE = 10  # seconds that rank 0 has to say what is wrong before another rank does


@dataclass(frozen=True)
class World:
    """This process among the others."""
    rank: int
    size: int
    device: torch.device
    machines: bool = False  # are there several

    @classmethod
    def here(cls):
        """This process as torchrun's environment has it, with its GPU or its share of the cores, not yet in a
        group with the others; alone without torchrun. On one machine with fewer GPUs than processes, those
        without a GPU leave quietly, so that the same command serves a CPU and any number of GPUs."""
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
                print(f"{gpus} of {size} processes work: each needs a GPU of its own")
            size = gpus
        device = torch.device("cuda", local) if gpus else torch.device("cpu")
        if gpus:
            torch.cuda.set_device(device)
        elif size > 1 and os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun's default, for any machine
            torch.set_num_threads(max(1, CORES // local_size))
        return cls(rank, size, device, machines=size > local_size)

    @classmethod
    def join(cls):
        """`here`, and in torchrun's process group: nccl on GPUs, gloo else."""
        world = cls.here()
        if world.size > 1:
            store = next(rendezvous("env://", world.rank, world.size))[0]
            # After a restart torchrun's store still holds the addresses of the dead. On one machine the count
            # of restarts keeps them apart; on several each counts its own, so there torchrun has to make new
            # stores: support/README's TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
            if not world.machines:
                store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            # an hour: the others wait while rank 0 renders a toy world or makes a sample sheet
            dist.init_process_group("nccl" if world.device.type == "cuda" else "gloo", store=store,
                                    rank=world.rank, world_size=world.size, timeout=timedelta(hours=1))
        return world

    def barrier(self):
        if self.size > 1:
            dist.barrier()

    def all(self, flag):
        """Is it true on every process. All of them must ask."""
        flag = torch.tensor(float(flag), device=self.device)
        if self.size > 1:
            dist.all_reduce(flag, dist.ReduceOp.MIN)
        return bool(flag)

    def mean(self, tensor):
        """The mean of a number over all processes. All of them must ask."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return float(tensor) / self.size

    def agree(self, value):
        """Process 0's value, on every process."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def leave(self):
        if self.size > 1:
            dist.destroy_process_group()

    @contextmanager
    def one_voice(self):
        """Only rank 0 prints. Another rank's error waits PATIENCE seconds: rank 0 mostly has the same one and
        says it, and torchrun ends the others."""
        if self.rank == 0:
            yield
            return
        with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
            try:
                yield
            except Exception:
                time.sleep(PATIENCE)
                raise


# ------------------------------------------------------------------------------------------ DDP and sharding
def shard(model, world, bf16):
    """FSDP2: every process holds its part of each float32 weight, and so of its gradient, its average and the
    optimizer's state. A block's weights are gathered when it computes, in bf16 if asked, its few float32 ones
    (norms, modulation) too; gradients are averaged in float32."""
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
    return DistributedDataParallel(model, find_unused_parameters=True, gradient_as_bucket_view=True)


@contextmanager
def synchronized(network, last):
    """For a backward: gradients are averaged over the processes in a step's last one only. Until then every
    process holds all of them, sharded or not."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(last)
    wait = isinstance(network, DistributedDataParallel) and not last
    with network.no_sync() if wait else nullcontext():
        yield


def local(tensor):
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor):
    """All of a tensor, gathered where it is sharded; then every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors, world):
    """{name: tensor} whole and on the CPU, for process 0; none for the others, which all must ask."""
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if world.rank == 0:
            found[name] = full.cpu()
    return found


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


@contextmanager
def one_line(folder):
    """torch.distributed.checkpoint's error is a page for each process."""
    try:
        yield
    except dcp.api.CheckpointException as error:
        _, (cause, _) = error.failures.popitem()
        raise UserError(f"{folder} cannot be written or read ({type(cause).__name__}: {cause})") from None


def save_shards(folder, model, optimizers, ema):
    """Every process writes its part into one folder, which all of them must see."""
    with one_line(folder):
        dcp.save(sharded_state(model, optimizers, ema), checkpoint_id=folder)


def load_shards(folder, model, optimizers, ema):
    """What save_shards wrote, by any number of processes."""
    state = sharded_state(model, optimizers, ema)
    with one_line(folder):
        dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizer"],
                   options=OPTIONS)


def compile_blocks(model):
    """torch.compile every block, all with one compilation a kind of shapes. Names stay as they are."""
    from torch._dynamo import config as dynamo
    from torch._functorch import config as functorch
    dynamo.optimize_ddp = False  # it cuts a graph where DDP's buckets end; a block is one graph
    # with and without references, caption longer than usual, gradients; with training's and with validation's
    # sizes, each fixed first, then as numbers that vary
    dynamo.recompile_limit = 64
    # GELU again in the backward: 3.0 GB held a block of 1.3b at 39,000 tokens, instead of 3.9
    functorch.ban_recompute_materialized_backward = False
    for block in model.blocks:
        block.compile(fullgraph=True)


# ---------------------------------------------------------------------------------------- one forward on many
class Ulysses:
    """One forward over all ranks (DeepSpeed-Ulysses, arXiv 2309.14509). A rank holds l of the L tokens, the
    first ones one more where L does not divide; in self-attention all L of n heads. For sampling: no gradient
    passes. B batch, N all heads, K head width."""

    def __init__(self, world, num_heads):
        if world.size == 1:
            raise UserError("--ulysses splits a video over several processes, and this is one: start with "
                            "torchrun --nproc-per-node 2, on GPUs with one for each")
        if num_heads % world.size:
            fits = ", ".join(str(n) for n in range(2, num_heads + 1) if num_heads % n == 0)
            raise UserError(f"--ulysses: {num_heads} heads do not split over {world.size} processes: "
                            f"give torchrun --nproc-per-node one of {fits or 'none, leave --ulysses out'}")
        self.rank, self.ranks = world.rank, world.size
        self.lengths = []  # each rank's number of tokens

    def spread(self, network):
        """Let a HarmoView share its tokens with those of the other ranks: what replaces methods of its own
        knows of ranks, the network does not."""
        network.through_blocks = functools.partial(self.through_blocks, network.through_blocks)
        for block in network.blocks:
            block.layer = functools.partial(self.layer, block.self_attn, block.layer)

    def through_blocks(self, through_blocks, video, *others):
        """HarmoView.through_blocks, on this rank's part of the video's tokens -> those of all ranks."""
        tokens, time6, (positions, tables) = video
        parts = positions.tensor_split(self.ranks)
        self.lengths = [len(part) for part in parts]
        mine = tokens.tensor_split(self.ranks, dim=1)[self.rank]
        return self.gather(through_blocks((mine, time6, (parts[self.rank], tables)), *others))

    def layer(self, attention, layer, tokens, context, seen, ref_kv=None, return_kv=False):
        """Block.layer. Of one-way references, which alone return keys and values, every rank computes all and
        keeps those of its heads."""
        plain = attention.attend
        if not return_kv:
            attention.attend = functools.partial(self.attend, plain)
        try:
            x, kv = layer(tokens, context, seen, ref_kv, return_kv)
        finally:
            attention.attend = plain
        return x, self.own_heads(*kv) if return_kv else None

    def exchange(self, x, sent, received):
        """x [tokens, ...] in one run for each rank, of `sent` tokens -> of `received` tokens from each."""
        assert not torch.is_grad_enabled()
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), received, sent)
        return out

    def own_heads(self, *tensors):
        """Keys and values [B, N, M, K] -> those of this rank's heads, [B, n, M, K]."""
        return [x.chunk(self.ranks, dim=1)[self.rank].clone() for x in tensors]

    def attend(self, attend, q, k, v, ref_kv=None, seen=None):
        """attend(q, k, v), each [B, N, l, K], to the tokens of all ranks -> [B, N, l, K]. ref_kv: of one-way
        references, of this rank's heads."""
        mine = [q.shape[2]] * self.ranks
        qkv = torch.stack((q, k, v)).unflatten(2, (self.ranks, -1))  # [3, B, ranks, n, l, K]
        qkv = qkv.permute(2, 4, 0, 1, 3, 5).flatten(0, 1)  # [ranks*l, 3, B, n, K]
        qkv = self.exchange(qkv, mine, self.lengths).permute(1, 2, 3, 0, 4)  # [3, B, n, L, K]
        y = attend(*qkv, ref_kv).permute(2, 0, 1, 3)  # [L, B, n, K]
        y = self.exchange(y, self.lengths, mine).unflatten(0, (self.ranks, -1))  # [ranks, l, B, n, K]
        return y.permute(2, 0, 3, 1, 4).flatten(1, 2)  # [B, ranks*n, l, K]

    def gather(self, x):
        """x [B, l, C] of every rank -> [B, L, C] on all."""
        x = x.transpose(0, 1)  # [l, B, C]
        return self.exchange(x.repeat(self.ranks, 1, 1), [len(x)] * self.ranks, self.lengths).transpose(0, 1)
