"""AdamW with warm-up and cosine, and fp32 masters for what is trained in less.

Adam divides tiny first moments by tiny second ones, and an update of 1e-4 of a weight is lost in bf16's eight bits, so
every trained number has an fp32 copy that the optimiser steps. LoRA matrices are fp32 to begin with (under a percent of
the model), so their copy is themselves; only full tuning of bf16 weights needs a second one. Gradients are added up
over micro-batches in fp32 for the same reason.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.95)
"""A second moment with a memory of some 20 steps: fine-tuning runs are short, and 0.999 would not forget the start."""


def rate(step: int, steps: int, warmup: float, floor: float) -> float:
    """Share of the highest learning rate at optimiser step `step` (from 0) of `steps`."""
    rising = min(math.ceil(warmup * steps), steps - 1)
    if step < rising:
        return (step + 1) / rising
    progress = min((step - rising) / max(steps - rising, 1), 1.0)
    return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2


class Optimiser:
    """The trained parameters of a module, their fp32 masters, and AdamW over them."""

    def __init__(self, module: nn.Module, *, learning_rate: float, weight_decay: float, sharded: bool = False) -> None:
        self._rate = learning_rate
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("the model has nothing to train: no parameter requires a gradient")
        self.masters = {name: self._master(p) for name, p in self.parameters.items()}
        groups = [
            {"params": [p for p in self.masters.values() if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in self.masters.values() if p.ndim < 2], "weight_decay": 0.0},
        ]
        self._adam = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=learning_rate, betas=BETAS, fused=not sharded
        )

    def gradients(self) -> list[Tensor]:
        """The fp32 gradient of every master; zeros where no row touched it."""
        for master in self.masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return [master.grad for master in self.masters.values() if master.grad is not None]

    def clip(self, most: float) -> float:
        """Scale the gradient down to norm `most`; returns its norm before."""
        norm = nn.utils.clip_grad_norm_(self.masters.values(), most)
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return float(whole)

    def step(self, share: float) -> None:
        """One update at `share` of the learning rate, and clean gradients."""
        for group in self._adam.param_groups:
            group["lr"] = self._rate * share
        self._adam.step()
        self.forget_gradients()
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                with torch.no_grad():
                    parameter.copy_(self.masters[name])

    def forget_gradients(self) -> None:
        for master in self.masters.values():
            master.grad = None

    def state(self) -> dict[str, Tensor]:
        """Masters and moments by name: all that an exact resume needs."""
        found: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            found[f"master/{name}"] = local(master.detach())
            found |= {f"{key}/{name}": local(value) for key, value in self._adam.state[master].items()}
        return found

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up exactly where `state` was saved."""
        wanted = {f"master/{name}" for name in self.masters}
        if missing := wanted ^ {name for name in state if name.startswith("master/")}:
            raise ValueError(f"the saved state is of another model: {', '.join(sorted(missing)[:3])} differ")
        for name, master in self.masters.items():
            local(master).copy_(state[f"master/{name}"])
            if self.parameters[name] is not master:
                self.parameters[name].copy_(master)
            for key in ("exp_avg", "exp_avg_sq", "step"):
                if f"{key}/{name}" in state:
                    self._adam.state[master][key] = self._like(master, state[f"{key}/{name}"], key)

    def _like(self, master: Tensor, saved: Tensor, key: str) -> Tensor:
        if key == "step":
            # The fused kernel counts steps on the parameter's device, the other one on the CPU.
            return saved.to(master.device if self._adam.defaults["fused"] else saved.device, copy=True)
        moment = torch.zeros_like(master)
        local(moment).copy_(saved)
        return moment

    def _master(self, parameter: nn.Parameter) -> Tensor:
        if parameter.dtype == torch.float32:
            return parameter
        master = parameter.detach().float().requires_grad_()
        parameter.register_post_accumulate_grad_hook(lambda p: _into(master, p))
        return master


def _into(master: Tensor, parameter: Tensor) -> None:
    """Add a micro-batch's gradient to the fp32 one and let go of it at once."""
    if parameter.grad is None:
        return
    gradient = parameter.grad.float()
    master.grad = gradient if master.grad is None else master.grad.add_(gradient)
    parameter.grad = None


def local(tensor: Tensor) -> Tensor:
    """This worker's part of a sharded tensor; a plain one is itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
