"""Steps as modules whose buffers are the optimizer's own tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from ..optim import Optimizer8bit
from ..optim.clipping import gradient_factors
from ..state.bucket import Bucket
from ..version import VERSION
from .spec import check_hyper, spec


class _Part(nn.Module):
    """A bucket as a module: its tensors are buffers under the names of the operator's arguments."""

    step: Tensor
    gnorm: Tensor | None
    percentile: Tensor | None
    max_unorm: Tensor | None
    unorm: Tensor | None
    group_of: Tensor
    own_hyper: Tensor | None
    has_own: Tensor | None

    def __init__(self, bucket: Bucket, group_of: Sequence[int], own: Sequence[Sequence[bool]]) -> None:
        super().__init__()
        if bucket.kind.sharding is not None:
            raise ValueError("a step of DTensors cannot be exported: a process has only a part of them")
        self.op, self.modes, self.geometry = bucket.op, bucket.kind.modes, bucket.geometry
        for arena, x in zip(bucket.op.arenas, bucket.arenas):
            self.register_buffer(arena.name, x)
        for name in ("step", "gnorm", "percentile", "max_unorm", "unorm"):
            self.register_buffer(name, getattr(bucket, name))
        self.register_buffer("group_of", torch.tensor(group_of, device=bucket.device))
        # Hyperparameters that a GlobalOptimManager sets for a parameter do not follow its group.
        some = any(map(any, own))
        self.register_buffer("own_hyper", bucket.hyper.table.clone() if some else None)
        self.register_buffer("has_own", torch.tensor(own, device=bucket.device) if some else None)

    def update(self, params: list[Tensor], grads: list[Tensor], hyper: Tensor, factor: Tensor | None) -> None:
        rows = hyper.to(self.step.device)[self.group_of]
        if self.own_hyper is not None and self.has_own is not None:
            rows = torch.where(self.has_own, self.own_hyper, rows)
        arenas = [getattr(self, arena.name) for arena in self.op.arenas]
        self.op.in_place(
            params,
            grads,
            *arenas,
            self.step,
            rows,
            grad_scale=factor,
            max_unorm=self.max_unorm,
            unorm=self.unorm,
            skip_zeros=self.modes.skip_zeros,
            block_wise=self.modes.block_wise,
            stochastic_round=self.modes.stochastic_round,
            geometry=self.geometry,
        )

    def whole(self, squares: Tensor) -> Tensor:
        """See `Clipped`."""
        return squares


class OptimizerStep(nn.Module):
    """The step of an optimizer as a function of parameters, gradients and hyperparameters.

    Its buffers are the optimizer's states, not copies: running it, or loading its ``state_dict``, is seen by
    the optimizer.

    Args:
        optimizer: Whose step it is; its structure, options and overrides are fixed from now on.
        names: Of the parameters, in the order of the optimizer's groups; by default those that the optimizer
            was given, or "0", "1", ...
    """

    optimizer: Optimizer8bit
    params_like: list[Tensor]
    max_norm: Tensor | None
    hyper_names: tuple[str, ...]

    def __init__(self, optimizer: Optimizer8bit, names: Sequence[str] | None = None) -> None:
        super().__init__()
        optimizer.init_state()
        params = [p for group in optimizer.param_groups for p in group["params"]]
        given = [n for group in optimizer.param_groups for n in group.get("param_names", [])]
        of_all = list(names or given or map(str, range(len(params))))
        if len(of_all) != len(params):
            raise ValueError(f"{len(of_all)} names of {len(params)} parameters")
        updated = [k for k, p in enumerate(params) if p in optimizer.state]
        #: Names of the parameters that are updated.
        self.param_names = [of_all[k] for k in updated]
        self.groups = len(optimizer.param_groups)
        #: Names of the columns of `hyper`.
        self.hyper_names = optimizer.family.rule(optimizer.param_groups[0]).hyper._fields
        self.max_grad_norm = optimizer.max_grad_norm
        limit = None if self.max_grad_norm is None else torch.tensor(float(self.max_grad_norm))
        self.register_buffer("max_norm", limit)
        # Not by attribute: a module would take a parameter for its own.
        self.__dict__["optimizer"] = optimizer
        self.__dict__["params_like"] = [params[k] for k in updated]
        index = {id(params[k]): i for i, k in enumerate(updated)}
        groups = optimizer.param_groups
        group_of = {id(p): g for g, group in enumerate(groups) for p in group["params"]}
        own = {id(p): _own_columns(optimizer, groups[group_of[id(p)]], p) for p in self.params_like}
        self.members = [[index[id(p)] for p in bucket.params] for bucket in optimizer.structure.buckets]
        self.parts = nn.ModuleList(
            _Part(
                bucket,
                [group_of[id(p)] for p in bucket.params],
                [own[id(p)] for p in bucket.params],
            )
            for bucket in optimizer.structure.buckets
        )

    def hyper(self) -> Tensor:
        """The optimizer's hyperparameters now: (groups, columns) float64."""
        self.check_current()
        groups = self.optimizer.param_groups
        rows = [[float(value) for value in self.optimizer.family.hyper(group)] for group in groups]
        return torch.tensor(rows, dtype=torch.float64)

    def check_current(self) -> None:
        """Raise if the optimizer no longer has the states that the buffers are.

        Raises:
            ValueError: If its structure has changed.
        """
        own = [part.step.data_ptr() for part in self.parts]  # type: ignore[operator]
        if own != [bucket.step.data_ptr() for bucket in self.optimizer.structure.buckets]:
            raise ValueError(
                "the optimizer has formed other buckets since this step was made from it (parameters, groups "
                "or options have changed): make another step"
            )

    def forward(self, params: list[Tensor], grads: list[Tensor], hyper: Tensor) -> tuple[()]:
        """Update `params` and the buffers.

        Args:
            params: In the order of `param_names`, like the optimizer's.
            grads: Of the same shapes.
            hyper: (groups, columns) float64, see `hyper_names`.

        Raises:
            ValueError: If a parameter or a gradient is missing or of another shape or dtype, or `hyper` is.
        """
        self.check(params, grads, hyper)
        with torch.no_grad():
            of_parts = [[grads[i] for i in members] for members in self.members]
            parts: list[Any] = list(self.parts)
            factors = gradient_factors(parts, of_parts, None, self.max_norm)
            for part, members, own, factor in zip(parts, self.members, of_parts, factors):
                part.update([params[i] for i in members], own, hyper, factor)
        return ()

    def check(self, params: Sequence[Tensor], grads: Sequence[Tensor], hyper: Tensor) -> None:
        """Raise ValueError if an argument of `forward` is not as it must be."""
        for what, tensors in (("params", params), ("grads", grads)):
            if len(tensors) != len(self.param_names):
                raise ValueError(
                    f"{len(tensors)} {what}, must be {len(self.param_names)}: {self.param_names}"
                )
            for name, like, x in zip(self.param_names, self.params_like, tensors):
                if x.shape != like.shape or (what == "params" and x.dtype != like.dtype):
                    raise ValueError(f"{what}: {name} is {spec(x)}, must be {spec(like)}")
        check_hyper(hyper, self.groups, self.hyper_names)

    def inputs(self) -> tuple[Any, ...]:
        """Arguments to export with: parameters and gradients of zeros, and `hyper`."""
        params, grads = ([torch.zeros_like(x) for x in self.params_like] for _ in range(2))
        return params, grads, self.hyper()

    def export(self) -> torch.export.ExportedProgram:
        """``torch.export`` of this module."""
        return torch.export.export(self, self.inputs()).run_decompositions({})

    def describe(self) -> dict[str, Any]:
        """What `package` writes into the artefact's metadata."""
        parts: list[Any] = list(self.parts)
        return {
            "kind": type(self).__name__,
            "bnb_compile": VERSION,
            "torch": torch.__version__.split("+")[0],
            "params": {name: spec(x) for name, x in zip(self.param_names, self.params_like)},
            "tensors": {name: spec(x) for name, x in self.named_buffers()},
            "buckets": [
                {
                    "op": part.op.name,
                    "params": [self.param_names[i] for i in members],
                    **part.modes._asdict(),
                }
                for part, members in zip(parts, self.members)
            ],
            "max_grad_norm": self.max_grad_norm,
            "groups": self.groups,
            "hyper": list(self.hyper_names),
        }


class TrainStep(nn.Module):
    """Forward, backward, clipping and step as one function of hyperparameters and a batch.

    Its buffers are the model's parameters and buffers and the optimizer's states, not copies.

    Args:
        model: The model; parameters that the optimizer does not have are constants.
        loss_fn: ``(model, *batch) -> loss``, a tensor with one element; it calls what it is given as `model`.
        optimizer: Of parameters of the model. Its `max_grad_norm` is the clipping.
    """

    model: nn.Module

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Tensor], optimizer: Optimizer8bit) -> None:
        super().__init__()
        names = {id(p): name for name, p in model.named_parameters()}
        params = [p for group in optimizer.param_groups for p in group["params"]]
        foreign = [tuple(p.shape) for p in params if id(p) not in names]
        if foreign:
            raise ValueError(f"parameters of shapes {foreign} are the optimizer's, but not the model's")
        self.step = OptimizerStep(optimizer, [names[id(p)] for p in params])
        self.__dict__["model"], self.loss_fn = model, loss_fn
        self.trained = self.step.param_names
        tensors = [*model.named_parameters(), *model.named_buffers()]
        #: Names in the model of the buffers `tensor0`, `tensor1`, ...
        self.model_names = [name for name, _ in tensors]
        for k, (_, x) in enumerate(tensors):
            self.register_buffer(f"tensor{k}", x.detach())

    def hyper(self) -> Tensor:
        """The optimizer's hyperparameters now: (groups, columns) float64."""
        self.check_current()
        return self.step.hyper()

    def check_current(self) -> None:
        """Raise if the model or the optimizer no longer has the tensors that the buffers are.

        Raises:
            ValueError: If one was replaced.
        """
        self.step.check_current()
        now = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        for name, x in self.tensors(self).items():
            if name not in now or now[name].data_ptr() != x.data_ptr() or now[name].shape != x.shape:
                raise ValueError(f"{name} was replaced since this step was made from it: make another step")

    def tensors(self, buffers: nn.Module) -> dict[str, Tensor]:
        """The model's parameters and buffers by name, from the buffers of a module."""
        return {name: getattr(buffers, f"tensor{k}") for k, name in enumerate(self.model_names)}

    def _loss_and_grads(self, tensors: dict[str, Tensor], batch: Sequence[Tensor]) -> tuple[Any, ...]:
        with torch.enable_grad():
            leaves = [tensors[name].detach().requires_grad_() for name in self.trained]
            used = {**tensors, **dict(zip(self.trained, leaves))}
            loss = self.loss_fn(lambda *args: functional_call(self.model, used, args), *batch)
            grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        unused = [name for name, grad in zip(self.trained, grads) if grad is None]
        if unused:
            raise ValueError(f"the loss does not depend on {unused}: freeze them, or leave them out")
        return loss.detach(), list(grads)

    def forward(self, hyper: Tensor, *batch: Tensor) -> Tensor:
        """Train on a batch, and return the loss.

        Raises:
            ValueError: If `hyper` is not (groups, columns) float64.
        """
        check_hyper(hyper, self.step.groups, self.step.hyper_names)
        tensors = self.tensors(self)
        loss, grads = self._loss_and_grads(tensors, batch)
        self.step([tensors[name] for name in self.trained], grads, hyper)
        return loss

    def export(self, *batch: Tensor, dynamic: bool = True) -> torch.export.ExportedProgram:
        """``torch.export`` of this module.

        Args:
            batch: An example.
            dynamic: Whether the first dimension of each tensor of a batch may have any size.
        """
        batch = without_views(batch)

        # torch.export does not trace autograd, so the graph of loss and gradients is made first.
        def loss_and_grads(tensors: dict[str, Tensor], batch: Sequence[Tensor]) -> tuple[Any, ...]:
            return self._loss_and_grads(tensors, batch)

        graph = make_fx(loss_and_grads, tracing_mode="symbolic")(self.tensors(self), batch)
        traced = _Traced(self, graph)
        first = {0: torch.export.Dim.DYNAMIC} if dynamic else {}
        shapes = (None, tuple(first if x.dim() else None for x in batch))
        with torch.no_grad():
            program = torch.export.export(traced, (self.hyper(), *batch), dynamic_shapes=shapes)
            # The default table (torch 2.13) decomposes a CPU's attention into one whose backward is wrong.
            return program.run_decompositions({})

    def describe(self) -> dict[str, Any]:
        """What `package` writes into the artefact's metadata."""
        tensors = {name: spec(x) for name, x in self.named_buffers()}
        own = {"kind": "TrainStep", "tensors": tensors, "model": self.model_names}
        return {**self.step.describe(), **own}


class _Traced(nn.Module):
    """A `TrainStep` whose loss and gradients are a graph; its buffers have the same names."""

    of: TrainStep

    def __init__(self, step: TrainStep, graph: nn.Module) -> None:
        super().__init__()
        for name, x in step.named_buffers(recurse=False):
            self.register_buffer(name, x)
        self.step, self.graph = step.step, graph
        self.__dict__["of"] = step

    def forward(self, hyper: Tensor, *batch: Tensor) -> Tensor:
        tensors = self.of.tensors(self)
        loss, grads = self.graph(tensors, batch)
        self.step([tensors[name] for name in self.of.trained], grads, hyper)
        return loss


def _own_columns(optimizer: Optimizer8bit, group: dict[str, Any], param: Tensor) -> list[bool]:
    """Which columns of `hyper` a GlobalOptimManager sets for a parameter."""
    family = optimizer.family
    override = optimizer.overrides.get(id(param), {})
    keys = {"betas" if key in family.betas else key for key in override} & group.keys()
    marked = {key: (math.nan,) * len(family.betas) if key == "betas" else math.nan for key in keys}
    return [math.isnan(value) for value in family.hyper({**group, **marked})]


def without_views(batch: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Copies, because with an example that is a view torch.export (2.13) guards on its base."""
    # With an example that is a view, torch.export (2.13) guards on the base, which fake tensors do not have.
    return tuple(x.clone() for x in batch)
