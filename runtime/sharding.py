"""FSDP2: a model whose weights, gradients and optimizer states are spread over the ranks.

    torchrun --nproc_per_node=8 train.py --train.shard=full

For models of which one GPU cannot hold weights, gradients and optimizer states.  Every block is
gathered for its own pass, forward and backward, and freed again.  Its gradient is summed over the
ranks as it is computed, so distributed.add_up has nothing left to do.  What is saved is whole:
files, checkpoints and exports are those of a single process.
"""
import contextlib
import functools

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from runtime import distributed


def shard(model, device):
    """Spread a model over the ranks, in place.  -> the same model"""
    mesh = mesh_of(device.type)
    for block in model.model.layers.values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # parameters() are always shards
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # losses are parts of one mean: gradients add up
            module.set_force_sum_reduction_for_comms(True)  # gloo has no mean
    return model


@functools.cache
def mesh_of(device_type):
    """All ranks in one row"""
    return init_device_mesh(device_type, (distributed.world_size(),))


@contextlib.contextmanager
def gathered(model):
    """Within it each rank has all weights, for passes without gradients that do not go together."""
    groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for group in groups:
        group.set_reshard_after_forward(False, recurse=False)
        group.unshard()
    try:
        yield
    finally:
        for group in groups:
            group.set_reshard_after_forward(True, recurse=False)
            group.reshard()


def is_sharded(parameters):
    return isinstance(next(iter(parameters), None), DTensor)


def whole(value, place=lambda x: x):
    """A tensor, or a nested dictionary or list of them -> the same with whole tensors

    place: called with each whole tensor -> what takes its place, such as a copy in CPU memory.
    Every rank has to call it: the tensors are put together one after the other.
    """
    if isinstance(value, DTensor):
        return place(value.full_tensor().detach())
    if isinstance(value, dict):
        return {key: whole(item, place) for key, item in value.items()}
    if isinstance(value, list):
        return [whole(item, place) for item in value]
    return value


def load_state(part, state):
    """part.load_state_dict(state), where the state is whole and the part may have shards.

    part: a module, an optimizer, a scaler
    """
    if isinstance(part, torch.optim.Optimizer):
        parameters = [p for group in part.param_groups for p in group["params"]]
        if is_sharded(parameters):
            moments = {}
            for i, values in state["state"].items():
                moments[i] = {name: shards(x, parameters[i]) for name, x in values.items()}
            state = {**state, "state": moments}
    elif isinstance(part, torch.nn.Module) and is_sharded(part.parameters()):
        with torch.no_grad():
            for name, parameter in part.named_parameters():
                parameter.copy_(shards(state[name], parameter))
        return
    part.load_state_dict(state)


def shards(x, parameter):
    """A whole tensor -> shards like those of a parameter, if it has its shape"""
    if not isinstance(x, torch.Tensor) or x.shape != parameter.shape:
        return x  # Adam's number of steps
    x = x.to(parameter.device, parameter.dtype)
    return distribute_tensor(x, parameter.device_mesh, parameter.placements)


def gradients(losses, parameters):
    """Gradients of the sum of losses, a generator of scalars.  -> list of shards

    torch.autograd.grad would pass over the sums that FSDP2 computes in backward().
    """
    for loss in losses:
        loss.backward()
    out = []
    for parameter in parameters:
        out.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        parameter.grad = None
    return out
