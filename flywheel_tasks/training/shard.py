"""Models too large for one worker: FSDP2 over the blocks, and whole models written back from the shards."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from flywheel_tasks.training.step import World
from flywheel_tasks.training.task import Task


def shard(module: nn.Module) -> None:
    """Spread the module over the workers, block by block. What is trained is kept in fp32 and computed in bf16."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    low = {p.dtype for p in module.parameters()} & {torch.bfloat16, torch.float16}
    for parameter in module.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad or not low else parameter.data
    compute = low.pop() if low else None
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    kind = next(module.parameters()).device.type
    mesh = init_device_mesh(kind, (dist.get_world_size(),))
    for block in getattr(module, "blocks", ()):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)


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
