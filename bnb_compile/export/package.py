"""A step compiled with AOTInductor into a file."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .spec import difference, lines, spec
from .steps import OptimizerStep, TrainStep, without_views

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
    if not isinstance(step, (OptimizerStep, TrainStep)):
        raise TypeError(f"step is a {type(step).__name__}, must be an OptimizerStep or a TrainStep")
    if isinstance(step, TrainStep):
        batch = without_views(batch)
        sizes = {x.shape[0] for x in batch if x.dim()}
        if dynamic and len(sizes) > 1:
            raise ValueError(f"a batch of sizes {sorted(sizes)}, must be one size with {dynamic=}")
        program = step.export(*batch, dynamic=dynamic)
        inputs = {"hyper": spec(step.hyper())}
        inputs |= {f"batch[{k}]": spec(x, dynamic and x.dim() > 0) for k, x in enumerate(batch)}
    else:
        program = step.export()
        params, grads, hyper = step.inputs()
        inputs = {f"params: {name}": spec(x) for name, x in zip(step.param_names, params)}
        inputs |= {f"grads: {name}": spec(x) for name, x in zip(step.param_names, grads)}
        inputs["hyper"] = spec(hyper)
    description = {**step.describe(), "inputs": inputs}
    config = {
        "aot_inductor.metadata": {
            "bnb_compile": json.dumps(description),
            # The same in lines, for a program without a reader of JSON.
            "bnb_compile.kind": description["kind"],
            "bnb_compile.version": description["bnb_compile"],
            **{f"bnb_compile.{key}": lines(description[key]) for key in ("inputs", "tensors")},
        },
        # Otherwise a small or uniform buffer is taken for a constant although it is updated (torch 2.13).
        "always_keep_tensor_constants": True,
        "joint_graph_constant_folding": False,
    }
    return torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=config)


class Package:
    """A compiled step, bound to the tensors of an `OptimizerStep` or `TrainStep`; see `load`."""

    def __init__(self, path: str, step: Step) -> None:
        if not isinstance(step, (OptimizerStep, TrainStep)):
            raise TypeError(f"step is a {type(step).__name__}, must be an OptimizerStep or a TrainStep")
        step.check_current()
        try:
            self._model = torch._inductor.aoti_load_package(path)
        except RuntimeError as error:
            raise ValueError(f"{path} cannot be read as a package: {error}") from error
        metadata = self._model.get_metadata()
        if "bnb_compile" not in metadata:
            raise ValueError(f"{path} is not a package of bnb_compile")
        #: What the artefact was compiled for.
        self.description: dict[str, Any] = json.loads(metadata["bnb_compile"])
        self._step = step
        expected, found = step.describe(), self.description
        for key in expected:
            if key != "torch" and json.dumps(expected[key]) != json.dumps(found[key]):
                raise ValueError(f"{path} was compiled for another step: {difference(key, found, expected)}")
        buffers = dict(step.named_buffers())
        # The step's own tensors, so that Python sees what the artefact writes.
        own = {name: buffers[name] for name in self._model.get_constant_fqns()}
        self._model.load_constants(own, check_full_update=True, user_managed=True)

    def __call__(self, *args: Any, **named: Any) -> Any:
        """Run it, with the arguments of the module's ``forward``, by position.

        Raises:
            TypeError: If an argument is given by name.
            ValueError: If an argument is missing, or of another shape, dtype or layout than compiled for.
        """
        if named:
            raise TypeError(f"{sorted(named)} given by name: a compiled step takes its arguments by position")
        self._step.check_current()
        if isinstance(self._step, OptimizerStep):
            self._step.check(*args)
        inputs, expected = pytree.tree_leaves(args), self.description["inputs"]
        if len(inputs) != len(expected):
            raise ValueError(f"{len(inputs)} inputs, must be {len(expected)}: {', '.join(expected)}")
        batch: dict[str, int] = {}
        for x, (name, wanted) in zip(inputs, expected.items()):
            found = spec(x, "*" in wanted)
            if found != wanted:
                raise ValueError(f"{name} is {found}, must be {wanted}")
            if "*" in wanted:
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
