"""Which package runs a step on which type of device: the one door into what compiles.

A package registers by its name and is imported when it is needed, because it imports Inductor, which takes
seconds, and because nothing below may import it. Those of this package are in `devices`.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

#: How often something was done since the process began: "compiled" counts kernels, "kernel" calls of compiled
#: steps, "operator" calls of the eager reference, "captured" steps that became a part of a graph, "fallback"
#: optimizers that run the reference because a kernel could not be compiled.
counts: Counter[str] = Counter()


class CompileError(RuntimeError):
    """A kernel could not be compiled on this machine."""


class Backend(NamedTuple):
    """How steps run on a type of device.

    Attributes:
        package: Has a module `launch` with a class `Launcher`, and a module `graph` with `lower_step`,
            `lower_measure` and `lower_norms`.
        missing: Says what this machine lacks to compile a kernel, None if nothing.
    """

    package: str
    missing: Callable[[], str | None]


#: By type of device; `devices` has those of this package.
BACKENDS: dict[str, Backend] = {}
#: Names of modules with a function ``register``, which tells Inductor how to lower an operator.
LOWERINGS: list[str] = []


def of_device(device: str) -> Backend:
    """The backend of a type of device.

    Raises:
        NotImplementedError: If there is none.
    """
    if device not in BACKENDS:
        raise NotImplementedError(f"no kernels for {device!r} devices, only for {', '.join(BACKENDS)}")
    return BACKENDS[device]


def launcher(device: str) -> Callable[..., Any]:
    """What runs the kernel of a bucket outside of graphs; see `lowering.launcher.AbstractLauncher`."""
    return importlib.import_module(f"{of_device(device).package}.launch").Launcher


def lowering(device: str) -> Any:
    """The module that lowers operators for a type of device."""
    return importlib.import_module(f"{of_device(device).package}.graph")


def register_lowering(op: Any) -> None:
    """Tell Inductor how to lower an operator; called when a graph with it is traced."""
    for module in LOWERINGS:
        importlib.import_module(module).register(op)


_given_up: dict[str, str] = {}  # by type of device: why kernels cannot be compiled


def why_uncompiled(device: str) -> str | None:
    """Why steps cannot be compiled for a type of device, None if they can; warns once."""
    if device not in _given_up:
        reason = ""
        if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
            reason = "TORCH_COMPILE_DISABLE=1"
        elif device not in BACKENDS:
            reason = f"no kernels for {device!r} devices, only for {', '.join(BACKENDS)}"
        else:
            reason = BACKENDS[device].missing() or ""
        give_up(device, reason)
    return _given_up[device] or None


def give_up(device: str, reason: str) -> None:
    """Run steps on a type of device by the eager reference from now on, and say why."""
    _given_up[device] = reason
    if reason:
        counts["fallback"] += 1
        text = (
            f"optimizer steps on {device} run uncompiled: {reason} (python -m bnb_compile.doctor says more)"
        )
        warnings.warn(text, stacklevel=2)


def replaces_tensors() -> bool:
    """Whether tensors may be stand-ins without values: fake ones, or ones that are traced."""
    modes = _get_current_dispatch_mode_stack()
    return any(
        isinstance(mode, (FakeTensorMode, ProxyTorchDispatchMode, FunctionalTensorMode)) for mode in modes
    )


def is_traced() -> bool:
    """Whether what runs becomes a graph of ``make_fx``."""
    return any(isinstance(mode, ProxyTorchDispatchMode) for mode in _get_current_dispatch_mode_stack())
