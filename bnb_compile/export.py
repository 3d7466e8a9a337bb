"""An optimizer step, or a whole training step, as an artefact that runs without Python.

`OptimizerStep` and `TrainStep` are modules whose buffers are the optimizer's own tensors. They go through
``torch.export``, and `package` compiles them with AOTInductor into a file that `load` runs from Python and
any program from C++ (examples/export has one).

    step = TrainStep(model, loss_fn, optimizer)
    package(step, "train.pt2", x, y)
    run = load("train.pt2", step)           # or in C++: torch::inductor::AOTIModelPackageLoader
    loss = run(step.hyper(), x, y)          # updates the parameters and the states of `step`

`hyper` is a float64 tensor with a row for each param group, its columns named by `hyper_names`, so a schedule
is fed from outside. What the artefact is for, names, shapes and dtypes, is in its metadata and checked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from .optim import Optimizer8bit
from .optim.bucket import Bucket
from .optim.clipping import gradient_factors


class _Part(nn.Module):
    """A bucket as a module: its tensors are buffers under the names of the operator's arguments."""

    step: Tensor
    gnorm: Tensor | None
    max_unorm: Tensor | None
    group_of: Tensor
    own_hyper: Tensor | None
    has_own: Tensor | None

    def __init__(self, bucket: Bucket, group_of: Sequence[int], own: Sequence[Sequence[bool]]) -> None:
        super().__init__()
        self.op, self.percentile = bucket.op, bucket.percentile
        self.options = bucket.options
        for (name, _), arena in zip(bucket.op.arenas, bucket.arenas):
            self.register_buffer(name, arena)
        self.register_buffer("step", bucket.step)
        self.register_buffer("gnorm", bucket.gnorm)
        self.register_buffer("max_unorm", bucket.max_unorm)
        self.register_buffer("group_of", torch.tensor(group_of, device=bucket.device))
        # Hyperparameters that a GlobalOptimManager sets for a parameter do not follow its group.
        some = any(map(any, own))
        self.register_buffer("own_hyper", bucket.hyper.clone() if some else None)
        self.register_buffer("has_own", torch.tensor(own, device=bucket.device) if some else None)

    def update(self, params: list[Tensor], grads: list[Tensor], hyper: Tensor, factor: Tensor | None) -> None:
        rows = hyper.to(self.step.device)[self.group_of]
        if self.own_hyper is not None and self.has_own is not None:
            rows = torch.where(self.has_own, self.own_hyper, rows)
        arenas = [getattr(self, name) for name, _ in self.op.arenas]
        options = {**self.options, "grad_scale": factor, "max_unorm": self.max_unorm}
        self.op.in_place(params, grads, *arenas, self.step, rows, **options)


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
        self.__dict__["optimizer"] = optimizer
        self.__dict__["params_like"] = [params[k] for k in updated]
        index = {id(params[k]): i for i, k in enumerate(updated)}
        groups = optimizer.param_groups
        group_of = {id(p): g for g, group in enumerate(groups) for p in group["params"]}
        own = {id(p): _own_columns(optimizer, groups[group_of[id(p)]], p) for p in self.params_like}
        self.members = [[index[id(p)] for p in bucket.params] for bucket in optimizer._buckets]
        self.parts = nn.ModuleList(
            _Part(
                bucket,
                [group_of[id(p)] for p in bucket.params],
                [own[id(p)] for p in bucket.params],
            )
            for bucket in optimizer._buckets
        )

    def hyper(self) -> Tensor:
        """The optimizer's hyperparameters now: (groups, columns) float64."""
        groups = self.optimizer.param_groups
        rows = [[float(value) for value in self.optimizer.family.hyper(group)] for group in groups]
        return torch.tensor(rows, dtype=torch.float64)

    def forward(self, params: list[Tensor], grads: list[Tensor], hyper: Tensor) -> tuple[()]:
        """Update `params` and the buffers.

        Args:
            params: In the order of `param_names`, like the optimizer's.
            grads: Of the same shapes.
            hyper: (groups, columns) float64, see `hyper_names`.

        Raises:
            ValueError: If a parameter or a gradient is missing or of another shape or dtype, or `hyper` is.
        """
        self._check(params, grads, hyper)
        with torch.no_grad():
            of_parts = [[grads[i] for i in members] for members in self.members]
            parts: list[Any] = list(self.parts)
            factors = gradient_factors(parts, of_parts, None, self.max_grad_norm)
            for part, members, own, factor in zip(parts, self.members, of_parts, factors):
                part.update([params[i] for i in members], own, hyper, factor)
        return ()

    def _check(self, params: Sequence[Tensor], grads: Sequence[Tensor], hyper: Tensor) -> None:
        for what, tensors in (("params", params), ("grads", grads)):
            if len(tensors) != len(self.param_names):
                raise ValueError(
                    f"{len(tensors)} {what}, must be {len(self.param_names)}: {self.param_names}"
                )
            for name, like, x in zip(self.param_names, self.params_like, tensors):
                if x.shape != like.shape or (what == "params" and x.dtype != like.dtype):
                    raise ValueError(f"{what}: {name} is {_spec(x)}, must be {_spec(like)}")
        _check_hyper(hyper, self.groups, self.hyper_names)

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
            "bnb_compile": version("bnb_compile"),
            "torch": torch.__version__.split("+")[0],
            "params": {name: _spec(x) for name, x in zip(self.param_names, self.params_like)},
            "tensors": {name: _spec(x) for name, x in self.named_buffers()},
            "buckets": [
                {
                    "op": part.op.name,
                    "params": [self.param_names[i] for i in members],
                    "percentile_clipping": part.percentile,
                    **{name: option for name, option in part.options.items() if isinstance(option, bool)},
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
        return self.step.hyper()

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
        _check_hyper(hyper, self.step.groups, self.step.hyper_names)
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
        batch = _without_views(batch)

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
        tensors = {name: _spec(x) for name, x in self.named_buffers()}
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


Step = OptimizerStep | TrainStep


def package(step: Step, path: str, *batch: Tensor, dynamic: bool = True) -> str:
    """Compile a step with AOTInductor.

    Args:
        step: What to compile.
        path: Of the file to write, ending in ".pt2".
        batch: An example, for a `TrainStep`.
        dynamic: Whether the batch's size, the first dimension of all its tensors, may be any.

    Returns:
        str: The file's path.

    Raises:
        ValueError: If tensors of `batch` have several sizes, although it is `dynamic`.
    """
    if isinstance(step, TrainStep):
        batch = _without_views(batch)
        sizes = {x.shape[0] for x in batch if x.dim()}
        if dynamic and len(sizes) > 1:
            raise ValueError(f"a batch of sizes {sorted(sizes)}, must be one size with {dynamic=}")
        program = step.export(*batch, dynamic=dynamic)
        inputs = {"hyper": _spec(step.hyper())}
        inputs |= {f"batch[{k}]": _spec(x, dynamic and x.dim() > 0) for k, x in enumerate(batch)}
    else:
        program = step.export()
        params, grads, hyper = step.inputs()
        inputs = {f"params: {name}": _spec(x) for name, x in zip(step.param_names, params)}
        inputs |= {f"grads: {name}": _spec(x) for name, x in zip(step.param_names, grads)}
        inputs["hyper"] = _spec(hyper)
    description = {**step.describe(), "inputs": inputs}
    config = {
        "aot_inductor.metadata": {
            "bnb_compile": json.dumps(description),
            # The same in lines, for a program without a reader of JSON.
            "bnb_compile.kind": description["kind"],
            "bnb_compile.version": description["bnb_compile"],
            **{f"bnb_compile.{key}": _lines(description[key]) for key in ("inputs", "tensors")},
        },
        # Otherwise a small or uniform buffer is taken for a constant although it is updated (torch 2.13).
        "always_keep_tensor_constants": True,
        "joint_graph_constant_folding": False,
    }
    return torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=config)


class Package:
    """A compiled step, bound to the tensors of a `OptimizerStep` or `TrainStep`; see `load`."""

    def __init__(self, path: str, step: Step) -> None:
        self._model = torch._inductor.aoti_load_package(path)
        metadata = self._model.get_metadata()
        if "bnb_compile" not in metadata:
            raise ValueError(f"{path} is not a package of bnb_compile")
        #: What the artefact was compiled for.
        self.description: dict[str, Any] = json.loads(metadata["bnb_compile"])
        self._step = step
        expected, found = step.describe(), self.description
        for key in expected:
            if key != "torch" and json.dumps(expected[key]) != json.dumps(found[key]):
                raise ValueError(f"{path} was compiled for another step: {_difference(key, found, expected)}")
        buffers = dict(step.named_buffers())
        # The step's own tensors, so that Python sees what the artefact writes.
        own = {name: buffers[name] for name in self._model.get_constant_fqns()}
        self._model.load_constants(own, check_full_update=True, user_managed=True)

    def __call__(self, *args: Any) -> Any:
        """Run it, with the arguments of the module's ``forward``.

        Raises:
            ValueError: If an argument is missing, or of another shape, dtype or layout than compiled for.
        """
        if isinstance(self._step, OptimizerStep):
            self._step._check(*args)
        inputs, expected = pytree.tree_leaves(args), self.description["inputs"]
        if len(inputs) != len(expected):
            raise ValueError(f"{len(inputs)} inputs, must be {len(expected)}: {', '.join(expected)}")
        batch: dict[str, int] = {}
        for x, (name, spec) in zip(inputs, expected.items()):
            found = _spec(x, "*" in spec)
            if found != spec:
                raise ValueError(f"{name} is {found}, must be {spec}")
            if "*" in spec:
                batch[name] = len(x)
        if len(set(batch.values())) > 1:
            raise ValueError(f"a batch of sizes {batch}, must be one size")
        loss = self._model(*args)
        return () if isinstance(self._step, OptimizerStep) else loss


def load(path: str, step: Step) -> Package:
    """Load a compiled step, to run it on the parameters and states of `step`.

    Args:
        path: What `package` wrote.
        step: Of the same structure as what was compiled; its tensors are read and updated.

    Raises:
        ValueError: If the artefact was compiled for something else: it says what differs.
    """
    return Package(path, step)


def _check_hyper(hyper: Tensor, groups: int, names: Sequence[str]) -> None:
    if tuple(hyper.shape) != (groups, len(names)) or hyper.dtype != torch.float64:
        raise ValueError(
            f"hyper is {_spec(hyper)}, must be float64[{groups},{len(names)}]: for each param group "
            f"{', '.join(names)}"
        )


def _own_columns(optimizer: Optimizer8bit, group: dict[str, Any], param: Tensor) -> list[bool]:
    """Which columns of `hyper` a GlobalOptimManager sets for a parameter."""
    family = optimizer.family
    override = optimizer._overrides.get(id(param), {})
    keys = {"betas" if key in family.beta_names else key for key in override} & group.keys()
    marked = {key: (math.nan,) * family.betas if key == "betas" else math.nan for key in keys}
    return [math.isnan(value) for value in family.hyper({**group, **marked})]


def _without_views(batch: Sequence[Tensor]) -> tuple[Tensor, ...]:
    # With an example that is a view, torch.export (2.13) guards on the base, which fake tensors do not have.
    return tuple(x.clone() for x in batch)


def _spec(x: Tensor, any_size: bool = False) -> str:
    """Dtype and shape, and strides if not contiguous: ``float32[*,3,8,8]:[192,1,24,3]``.

    Args:
        x: The tensor.
        any_size: Whether the first dimension is written as ``*``.
    """
    sizes = ["*" if any_size and k == 0 else str(n) for k, n in enumerate(x.shape)]
    strides = "" if x.is_contiguous() else f":[{','.join(map(str, x.stride()))}]"
    return f"{str(x.dtype).removeprefix('torch.')}[{','.join(sizes)}]{strides}"


def _lines(specs: dict[str, str]) -> str:
    return "\n".join(f"{spec} {name}" for name, spec in specs.items())


def _difference(key: str, found: dict[str, Any], expected: dict[str, Any]) -> str:
    theirs, ours = found[key], expected[key]
    if not isinstance(ours, dict):
        return f"{key} is {theirs}, here it is {ours}"
    for name in (*theirs, *ours):
        there, here = theirs.get(name, "missing"), ours.get(name, "missing")
        if there != here:
            return f"{key}: {name} is {there}, here it is {here}"
    return f"the order of {key} is {list(theirs)}, here it is {list(ours)}"
