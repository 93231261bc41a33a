"""Models too large for one worker: FSDP2 over the blocks, and whole models written back from the shards.

The first worker alone reads the weights, into the memory of its machine and not of its GPU. Every worker builds the
model without any (on torch's `meta` device), spreads it, makes room for its own part, and gets that part as one tensor
after another goes round: no other worker ever holds more than its part and one tensor.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.training.step import World
from flywheel_tasks.training.task import Task


def build(task: Task, world: World) -> nn.Module:
    """The task's module, spread over the workers. What is trained is kept in fp32 and computed in the file's dtype."""
    module = task.build(torch.device("meta"))
    _spread(module, world.device)
    tied = _tied(module)
    module.to_empty(device=world.device)
    for owner, name, first in tied:  # room is made module by module, for a tied head twice
        setattr(module.get_submodule(owner), name, module.get_parameter(first))
    _fill(module, task.build(torch.device("cpu")) if world.rank == 0 else None)
    return module


def _spread(module: nn.Module, device: torch.device) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    low = {p.dtype for p in module.parameters()} & {torch.bfloat16, torch.float16}
    for parameter in module.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad or not low else parameter.data
    compute = low.pop() if low else None
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in getattr(module, "blocks", ()):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # After a pass without gradient too: whoever looks at the parameters between steps finds shards.
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def _tied(module: nn.Module) -> list[tuple[str, str, str]]:
    """(module, its parameter, the name under which that parameter came first) of every parameter with two names."""
    firsts: dict[int, str] = {}
    found = []
    for name, parameter in module.named_parameters(remove_duplicate=False):
        first = firsts.setdefault(id(parameter), name)
        if first != name:
            owner, _, own = name.rpartition(".")
            found.append((owner, own, first))
    return found


@torch.no_grad()
def _fill(module: nn.Module, whole: nn.Module | None) -> None:
    """The first worker's `whole` into every worker's part. Buffers that no state holds (rotary frequencies) go too."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    if whole is not None:
        wanted, found = (dict(one.named_parameters()).keys() for one in (module, whole))
        if odd := sorted(wanted ^ found):
            raise FlywheelError(
                f"the weights do not fit the configuration ({odd[0]} and {len(odd) - 1} more are in one of them only): "
                "a head that is tied in config.json has weights of its own in the file; set tie_word_embeddings"
            )
    state = {} if whole is None else whole.state_dict()
    set_model_state_dict(module, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for name, buffer in module.named_buffers():
        if whole is not None:
            buffer.copy_(whole.get_buffer(name))
        dist.broadcast(buffer, 0)


def is_spread(module: nn.Module) -> bool:
    """Whether its parameters are shards: then every pass, and every look at a whole weight, needs all workers."""
    return any(hasattr(parameter, "full_tensor") for parameter in module.parameters())


def write_model(module: nn.Module, task: Task, folder: Path, world: World) -> None:
    """The module as a checkpoint folder, written by the first worker."""
    if not world.sharded:
        if world.rank == 0:
            task.save(module, folder)
        return
    whole = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            gathered = parameter.detach().full_tensor()  # type: ignore[operator]
            if world.rank == 0:
                whole[name] = gathered.cpu()
    if world.rank == 0:
        plain = task.build(torch.device("cpu"))
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                if name in whole:
                    parameter.copy_(whole[name])
        task.save(plain, folder)
