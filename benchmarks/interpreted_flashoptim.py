"""FlashOptim's AdamW without a GPU: the package's own kernel under Triton's interpreter.

The package refuses a machine without CUDA. Its kernel needs none: with ``TRITON_INTERPRET=1`` set before
triton is imported it runs on the CPU, slowly and with the same results, but for the two functions of
libdevice, which the interpreter lacks. What surrounds the kernel here is what the package's optimizer does:
states of zeros, and the bits that a bfloat16 weight lacks beside it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

GROUP = 32  # elements of one scale
LARGEST = 32_768  # elements of a program: the interpreter's cost is by program, until the cache is full


class FlashAdamW(torch.optim.Optimizer):
    """flashoptim's class of this name, on the CPU, with 24 bits of a bfloat16 weight."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError("FlashOptim on a CPU needs TRITON_INTERPRET=1")
        import triton.language as tl
        from flashoptim import optimizers as package

        package.libdevice = SimpleNamespace(
            pow=lambda base, exponent: tl.exp2(exponent.to(tl.float32) * math.log2(base)),
            copysign=lambda size, sign: tl.where(sign < 0, -size, size),
        )
        package._get_sm_count = lambda device=None: 1 << 20  # no loop in a program
        if not isinstance(package._triton_adam_kernel, _LargePrograms):
            package._triton_adam_kernel = _LargePrograms(package._triton_adam_kernel)
        self._step = package._fused_adam_step
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Make a step; there is no closure."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    groups = -(-param.numel() // GROUP)
                    state["step"] = 0
                    for name, dtype in (("exp_avg", torch.int8), ("exp_avg_sq", torch.uint8)):
                        state[name] = torch.zeros(param.shape, dtype=dtype)
                        state[f"{name}_scales"] = torch.zeros(groups, dtype=torch.float16)
                    if param.dtype != torch.float32:
                        state["errors"] = torch.zeros(param.shape, dtype=torch.int8)
                state["step"] += 1
                self._step(
                    state["exp_avg"],
                    state["exp_avg_scales"],
                    state["exp_avg_sq"],
                    state["exp_avg_sq_scales"],
                    param,
                    param.grad,
                    state.get("errors"),
                    group["lr"],
                    *group["betas"],
                    group["eps"],
                    group["weight_decay"] * group["lr"],
                    decoupled=True,
                    step=state["step"],
                    group_size=GROUP,
                )

    def second_moment(self, param: torch.Tensor) -> torch.Tensor:
        """Float32, of the parameter's shape: (code / 255 * scale) squared."""
        state = self.state[param]
        codes = state["exp_avg_sq"].float().flatten() / 255
        root = codes * state["exp_avg_sq_scales"].float().repeat_interleave(GROUP)[: codes.numel()]
        return root.square().view(param.shape)


class _LargePrograms:
    """The kernel with programs as large as the tensor."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.place = kernel.arg_names.index("N")

    def __getitem__(self, grid: Callable[[dict], tuple]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            size = 1 << max(GROUP, args[self.place] - 1).bit_length()
            self.kernel[grid](*args, **{**options, "BLOCK_SIZE_N": min(size, LARGEST)})

        return launch
