"""One run in several processes, as torchrun starts them: one a GPU, or a few on a CPU.

    torchrun --nproc_per_node=8 train.py --config=configs/hh.toml

Every process, a rank, runs the same program on the same data, and rank 0 alone writes files and the
terminal.  Work is divided in two ways:

    dealt out      pieces that do not need each other (members, treatments, policies, seeds): every
                   rank takes its own, `alone()`, and they meet in the files
    data parallel  the rows of a batch, of a rollout or of a set that is scored are shared; what
                   they add up to (gradients, losses, rewards) is summed over the ranks

On one process every function here changes nothing.  docs/scaling.md says what is sent when.
"""
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from config import ConfigError
from runtime import heartbeat, signals

BUCKET = 2 ** 24  # numbers that are summed at once
LONGEST_WAIT = timedelta(days=30)  # for a rank that is at its own piece; torchrun sees deaths

num_alone = 0  # blocks of alone() that are open
num_shared = 0  # items of the last share() that was divided, 0 if they were too few


def join():
    """Join the other ranks, if torchrun has started this process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    from torch.distributed.rendezvous import rendezvous
    backend = "gloo"
    if local_rank() < torch.cuda.device_count():  # not run by CI
        torch.cuda.set_device(local_rank())
        backend = "cpu:gloo,cuda:nccl"
    store, own_rank, size = next(rendezvous("env://"))
    dist.init_process_group(
        backend, store=store, rank=own_rank, world_size=size, timeout=LONGEST_WAIT
    )
    heartbeat.start(store, own_rank, size)
    wait()  # until all hearts beat
    if own_rank > 0:
        signals.is_quiet = True
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def check_device(device):
    """Raise ConfigError unless this rank has a GPU of its own, where GPUs are wanted."""
    num_gpus = torch.cuda.device_count()
    if device.type == "cuda" and local_rank() >= num_gpus:
        raise ConfigError(f"device = cuda: this machine has {num_gpus} GPUs and more processes; "
                          f"give torchrun --nproc_per_node={num_gpus}, or --device=cpu")


def leave():
    """After the last piece of work; the others may still be at theirs."""
    heartbeat.note_end()
    if dist.is_initialized():
        dist.destroy_process_group()


def true_rank() -> int:
    """Number of this process, also in alone()"""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """Number of this process on its machine, which is that of its GPU"""
    return int(os.environ.get("LOCAL_RANK", "0"))


def rank() -> int:
    return 0 if num_alone else true_rank()


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() and not num_alone else 1


@contextlib.contextmanager
def alone():
    """Within it this process is the only one: for a piece of work that was dealt out to it."""
    global num_alone
    stdout = sys.stdout
    num_alone += 1
    if sys.__stdout__ is not None and true_rank() > 0:
        sys.stdout = sys.__stdout__  # of the pieces' results each rank prints its own
    try:
        yield
    finally:
        num_alone -= 1
        sys.stdout = stdout


def wait():
    """Until all ranks are here."""
    any_rank(False)


# --------------------------------------------------------------------------------------------------
# Shares


def share(items: Sequence, model: torch.nn.Module | None = None) -> tuple[Sequence, int]:
    """Every n-th of the items: of rows sorted by length each of n ranks has as many tokens.

    -> items of this rank, the number of ranks that have the same.  Fewer items than ranks are not
    shared: all ranks compute all of them, and each counts as a part of one.  So it is with a model
    of shards, each of whose passes needs all ranks.
    """
    global num_shared
    is_sharded = hasattr(model, "reshard")
    num_shared = len(items) if len(items) >= world_size() and not is_sharded else 0
    if not num_shared:
        return items, world_size()
    return items[rank()::world_size()], 1


def share_of_counts(counts: Sequence) -> tuple[slice, float]:
    """A contiguous share of items, for those whose neighbours belong together.

    counts: of each item, such as its tokens
    -> slice of this rank's items, the share of the counts that it stands for
    """
    if len(counts) < world_size():
        return slice(None), 1 / world_size()
    parts = np.array_split(np.arange(len(counts)), world_size())
    own = slice(int(parts[rank()][0]), int(parts[rank()][-1]) + 1)
    return own, float(sum(counts[own]) / sum(counts))


def merge(x: Tensor, own: Sequence[int], num_rows: int) -> Tensor:
    """Rows of this rank, at the places `own` of num_rows -> the rows of all ranks"""
    if len(own) == num_rows:  # one process, or too few rows to share
        return x
    dtype = torch.uint8 if x.dtype == torch.bool else x.dtype  # gloo sends no truth values
    rows = torch.zeros(num_rows, *x.shape[1:], dtype=dtype, device=x.device)
    rows[list(own)] = x.to(dtype)
    dist.all_reduce(rows)  # the others have 0 there
    return rows.to(x.dtype)


def gather(x: Tensor) -> Tensor:
    """Rows of this rank's share, by the last share() -> the rows of all, in their order

    A gradient flows to this rank's rows only; where each rank has computed the whole loss, the sum
    of the ranks' gradients is that of one process.
    """
    if world_size() == 1 or not num_shared:
        return x
    own = range(rank(), num_shared, world_size())
    rows = merge(x.detach(), own, num_shared)
    if x.requires_grad:
        rows[list(own)] = x
    return rows


def count_once(loss: Tensor) -> Tensor:
    """A loss that all ranks compute of gathered rows -> the same gradient, an n-th of the value"""
    if world_size() == 1 or not num_shared:
        return loss
    return loss - loss.detach() * (1 - 1 / world_size())


def divide_gradient(x: Tensor) -> Tensor:
    """A weight that all ranks use for the same loss -> the same weight, an n-th of the gradient"""
    if world_size() == 1 or not num_shared:
        return x
    return x.detach() + (x - x.detach()) / world_size()


# --------------------------------------------------------------------------------------------------
# Sums and decisions


def add_up(tensors: Sequence[Tensor]):
    """Replace tensors, all of one dtype and device, by their sums over the ranks, in place.

    Shards (runtime/sharding.py) are sums already.
    """
    if world_size() == 1:
        return
    from torch.distributed.tensor import DTensor  # here: its import takes a second
    tensors = [tensor for tensor in tensors if not isinstance(tensor, DTensor)]
    for bucket in buckets(tensors):
        flat = torch.cat([tensor.detach().flatten() for tensor in bucket])
        dist.all_reduce(flat)
        for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket])):
            tensor.detach().copy_(part.view_as(tensor))


def buckets(tensors):
    """-> lists of tensors, of at most BUCKET numbers where a single one has no more"""
    bucket = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > BUCKET:
            yield bucket
            bucket = []
            size = 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket


def total(numbers: Sequence[float]) -> list[float]:
    """Sums over the ranks of a few numbers"""
    if world_size() == 1:
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


def of_each_rank(number: float) -> list[float]:
    """The numbers that the ranks give, in their order"""
    numbers = [0.0] * world_size()
    numbers[rank()] = number
    return total(numbers)


def any_rank(*flags: bool) -> list[bool]:
    """Whether each flag is set at some rank"""
    if world_size() == 1:
        return list(flags)
    numbers = torch.tensor(flags, dtype=torch.int64)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers.bool().tolist()


def agree(value, source: int = 0):
    """What one rank gives, at every rank.  value: anything that JSON can hold"""
    if world_size() == 1:
        return value
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    size = torch.tensor(len(text))
    dist.broadcast(size, source)
    if rank() != source:
        text = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(text, source)
    return json.loads(bytes(text.tolist()))


# --------------------------------------------------------------------------------------------------
# Failures


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another rank cannot be reached."""
    words = str(error).lower()
    is_of_network = isinstance(error, dist.DistError) or "gloo" in words or "nccl" in words
    return dist.is_initialized() and isinstance(error, RuntimeError) and is_of_network


# --------------------------------------------------------------------------------------------------
# What a Run has of all this


class Ranks:
    """On one process rank is 0, world_size 1, and every call gives back what it is given."""
    share = staticmethod(share)
    share_of_counts = staticmethod(share_of_counts)
    merge = staticmethod(merge)
    add_up = staticmethod(add_up)
    total = staticmethod(total)
    of_each_rank = staticmethod(of_each_rank)

    @property
    def rank(self):
        return rank()

    @property
    def world_size(self):
        return world_size()

    @property
    def ranks(self):
        """What a loss over the rows of all ranks needs; None on one process"""
        return sys.modules[__name__] if world_size() > 1 else None
