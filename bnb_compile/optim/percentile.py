"""Percentile clipping for any optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..ops.norms import NORM_DTYPES
from ..state.checkpoint import RING
from ..validate import flag, integer
from .clipping import gradient_norms, percentile_factor, present_mask


class PercentileClipper:
    """Clips gradients in place to a percentile of their last 100 norms, for any optimizer.

    There is no synchronisation and no branch: it can be a part of a compiled or a CUDA graph.

    Args:
        parameters: Whose gradients to clip.
        percentile: In [1, 99]: a norm is limited to this percentile of the last 100, itself included.
        per_parameter: Whether each gradient has a norm of its own, as in bitsandbytes; otherwise there is one
            norm of all of them.

    Raises:
        ValueError: If there are no parameters, or `percentile` is out of its range.

    Example:
        >>> clipper = PercentileClipper(model.parameters(), percentile=5)
        >>> loss.backward()
        >>> clipper.clip_()
        >>> optimizer.step()
    """

    def __init__(self, parameters: Iterable[Tensor], percentile: int = 5, per_parameter: bool = True) -> None:
        self.parameters = list(parameters)
        if not self.parameters:
            raise ValueError("parameters is empty, must have at least one")
        self.percentile = integer("percentile", percentile)
        if not 1 <= self.percentile <= 99:
            raise ValueError(f"Invalid percentile: {percentile}, must be in [1, 99]")
        self.per_parameter = flag("per_parameter", per_parameter)
        for param in self.parameters:
            if not isinstance(param, Tensor):
                raise TypeError(f"parameters has {param!r}, must be tensors")
        count = len(self.parameters) if per_parameter else 1
        device = self.parameters[0].device
        #: Squared norms, and how many steps each has seen.
        self.ring = torch.zeros(count, RING, dtype=torch.float32, device=device)
        self.step = torch.zeros(count, dtype=torch.int64, device=device)
        self._percentile = torch.full((count,), self.percentile, dtype=torch.int64, device=device)

    @torch.no_grad()
    def clip_(self) -> Tensor:
        """Scale the gradients that there are.

        Raises:
            TypeError: If a gradient is sparse or of a dtype without norms; nothing has been changed then.

        Returns:
            Tensor: Norms before clipping, float32: ``(n,)`` for the n parameters, 0 where there is no
            gradient; ``(1,)`` with one norm for all.
        """
        grads = [param.grad for param in self.parameters]
        for grad in grads:
            if grad is not None and (grad.layout is not torch.strided or grad.dtype not in NORM_DTYPES):
                raise TypeError(
                    f"a gradient of {grad.dtype}, {grad.layout}: must be strided (dense) "
                    f"and one of {NORM_DTYPES}"
                )
        norms = gradient_norms(grads, self.ring.device)
        present = None
        if self.per_parameter:
            present = present_mask(grads, self.ring.device)
        else:
            norms = norms.square().sum(0, keepdim=True).sqrt()
        factor = percentile_factor(self.ring, norms.square(), present, self.step, self._percentile)
        self.step += 1 if present is None else present
        factors = factor.expand(len(grads)).unbind()
        for grad, scale in zip(grads, factors):
            if grad is not None:
                grad.mul_(scale)
        return norms

    def state_dict(self) -> dict[str, Any]:
        """The ring, (n, 100), and the steps, (n,)."""
        return {"ring": self.ring, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, in place.

        Raises:
            ValueError: If something is missing, or is of another number of parameters.
        """
        for name, own in self.state_dict().items():
            if not isinstance(state_dict.get(name), Tensor):
                raise ValueError(f"{name} must be a tensor, got {state_dict.get(name)!r}")
            if state_dict[name].shape != own.shape:
                raise ValueError(
                    f"{name} has shape {tuple(state_dict[name].shape)}, must be {tuple(own.shape)}"
                )
        for name, own in self.state_dict().items():
            own.copy_(state_dict[name])
