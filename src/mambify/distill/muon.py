"""Muon: steps whose singular values are all about one, for the matrices of the new mixers; AdamW for all else.

Momentum is made orthogonal by five Newton-Schulz iterations (Jordan et al., 2024), scaled to the size of AdamW's steps
so that one learning rate serves both (arXiv 2502.16982, equation 4). Matrices of one shape are handled together, as one
batch: thirty mixers take as many kernel launches as one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.adamw import adamw

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_ADAMW_RMS = 0.2  # of a typical step of AdamW, in learning rates


class Muon(torch.optim.Optimizer):
    """Muon for the groups that say ``"muon": True`` (two-dimensional parameters only), AdamW for the others.

    Args:
        params: parameter groups; decoupled ``weight_decay`` in either kind.
        lr: of groups that name none.
        momentum: of Muon (Nesterov's).
        betas, eps: of AdamW.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"muon": False})
        for group in self.param_groups:
            if group["muon"] and any(p.dim() != 2 for p in group["params"]):
                raise ValueError("Muon takes matrices only")

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; parameters without a gradient stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            given = [p for p in group["params"] if p.grad is not None]
            if given and group["muon"]:
                self._muon(given, group)
            elif given:
                self._adamw(given, group)
        return loss

    def _muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        buffers = [self._state(p, "momentum") for p in parameters]
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, buffers, group["momentum"])
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        by_shape: dict[torch.Size, list[int]] = defaultdict(list)
        for index, parameter in enumerate(parameters):
            by_shape[parameter.shape].append(index)
        for (rows, columns), indices in by_shape.items():
            steps_LRC = orthogonalised(torch.stack([ahead[i] for i in indices]))
            size = -group["lr"] * _ADAMW_RMS * max(rows, columns) ** 0.5
            chosen = [parameters[i] for i in indices]
            torch._foreach_add_(chosen, list(steps_LRC.to(chosen[0].dtype).unbind()), alpha=size)

    def _adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        counts = []
        for parameter in parameters:
            state = self.state[parameter]
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32)
            counts.append(state["step"])
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [self._state(p, "exp_avg") for p in parameters],
            [self._state(p, "exp_avg_sq") for p in parameters],
            [],
            counts,
            foreach=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _state(self, parameter: Tensor, name: str) -> Tensor:
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter)
        found: Tensor = state[name]
        return found


def orthogonalised(matrices_LRC: Tensor) -> Tensor:
    """Each matrix U S Vᵀ of a batch ``[L, R, C]`` as about U Vᵀ: singular values between 0.7 and 1.2.

    In bfloat16 on a GPU, whose matrix units make it nearly free; the iteration corrects its own rounding.
    """
    a, b, c = _COEFFICIENTS
    x = matrices_LRC.bfloat16() if matrices_LRC.is_cuda else matrices_LRC.float()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.mT if tall else x
    return result
