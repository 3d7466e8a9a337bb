"""The base of every optimizer here, and the only one with a loop."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..ops.step import PARAM_DTYPES, STEP_OPS
from ..rules import Rule
from .bucket import Bucket
from .checkpoint import match_groups, read_state
from .group import ParamGroup


class Options(TypedDict, total=False):
    """Arguments that every optimizer takes besides its hyperparameters.

    Attributes:
        optim_bits: 8 for block-wise quantised states, 32 (the default) for float32. A class named for a
            number of bits has that many; there 32 is also accepted as bitsandbytes' default.
        args: An object whose attributes `optim_bits`, `min_8bit_size`, ... replace these arguments.
        min_8bit_size: Parameters with fewer elements have float32 states, whatever `optim_bits` is.
        percentile_clipping: Must be 100, which is off.
        block_wise: Must be True.
        is_paged: Must be False.
        compile: Whether `step` runs the compiled kernel; False runs the eager reference.
    """

    optim_bits: int
    args: Any
    min_8bit_size: int
    percentile_clipping: int
    block_wise: bool
    is_paged: bool
    compile: bool


#: What bitsandbytes keeps in ``optimizer.args``, and the values that mean "off".
_ARGS: dict[str, Any] = {
    "optim_bits": 32,
    "min_8bit_size": 4096,
    "max_unorm": 0.0,
    "skip_zeros": False,
    "percentile_clipping": 100,
    "block_wise": True,
}


def number(name: str, value: Any, below: float = math.inf) -> Any:
    """A hyperparameter, with a numeric string as a float.

    Raises:
        ValueError: If it is no number, or not in ``[0, below)``.
    """
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"Invalid {name}: {value!r}, must be a number") from None
    if not 0.0 <= value < below:  # also for NaN
        raise ValueError(f"Invalid {name}: {value}, must be in [0, {below})")
    return value


class AbstractOptimizer(torch.optim.Optimizer):
    """An optimizer whose states live in arenas and whose step is one kernel for each bucket.

    A bucket holds the parameters of one device, dtype and state format. States are created at the first
    step, or by `init_state`, for parameters that require a gradient or have one.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or groups of them, as for any torch optimizer.
        defaults: Hyperparameters of groups that do not have their own.
        options: See `Options`.
    """

    rule: ClassVar[Rule]
    bits: ClassVar[int | None] = None  # of a class that is named for them

    def __init__(self, params: Any, defaults: dict[str, Any], **options: Unpack[Options]) -> None:
        self._buckets: list[Bucket] = []
        self._places: dict[int, tuple[Bucket, int]] = {}  # by id of the parameter
        self._mirrored: dict[int, tuple[tuple[int, float], ...]] = {}  # by id of the group
        given: dict[str, Any] = dict(options)
        self._compile = bool(given.pop("compile", True))
        if given.pop("is_paged", False):
            raise NotImplementedError(f"{type(self).__name__}: is_paged=True is not implemented yet")
        args = given.pop("args", None)
        chosen = {name: getattr(args, name, given.pop(name, off)) for name, off in _ARGS.items()}
        if given:
            raise TypeError(f"{type(self).__name__} got unexpected arguments {sorted(given)}")
        for name in ("max_unorm", "skip_zeros", "percentile_clipping", "block_wise"):
            if chosen[name] != _ARGS[name]:
                raise NotImplementedError(
                    f"{type(self).__name__}: {name}={chosen[name]} is not implemented, only "
                    f"{name}={_ARGS[name]}"
                )
        allowed = (8, 32) if self.bits is None else (self.bits, 32)
        if chosen["optim_bits"] not in allowed:
            raise ValueError(
                f"{type(self).__name__}: optim_bits={chosen['optim_bits']}, must be one of {allowed}"
            )
        #: bitsandbytes' name for the options that are not per group.
        self.args = SimpleNamespace(**{**chosen, "optim_bits": self.bits or chosen["optim_bits"]})
        super().__init__(params, defaults)

    # -- to be given by a family ---------------------------------------------------------------

    def _hyper(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """The group's values of `rule.hyper`, each a number or a tensor with one element."""
        raise NotImplementedError

    def _check_group(self, group: dict[str, Any]) -> None:
        """Coerce and check the hyperparameters of a new group.

        Raises:
            ValueError: If one is out of its range.
        """
        raise NotImplementedError

    # -- groups --------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see ``torch.optim.Optimizer.add_param_group``."""
        for name, default in self.defaults.items():
            param_group.setdefault(name, default)
        self._check_group(param_group)
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        for param in added["params"]:
            if param.dtype not in PARAM_DTYPES:
                self.param_groups.pop()
                raise TypeError(f"a parameter of {param.dtype}: must be one of {PARAM_DTYPES}")
        self._adopt_groups()

    def _adopt_groups(self) -> None:
        self.param_groups[:] = [
            group if type(group) is ParamGroup else ParamGroup(group, self) for group in self.param_groups
        ]

    def _mirror_hyper(self, group: dict[str, Any], always: bool = True) -> None:
        """Bring a group's hyperparameters to the tensors that the step reads, if they have changed."""
        values = self._hyper(group)
        # A tensor is read by every step, so only which one it is matters here.
        known = tuple((id(v), 0.0) if isinstance(v, Tensor) else (0, float(v)) for v in values)
        if not always and self._mirrored.get(id(group)) == known:
            return
        rows: dict[Bucket, list[int]] = defaultdict(list)
        for param in group["params"]:
            if id(param) in self._places:
                bucket, k = self._places[id(param)]
                rows[bucket].append(k)
        row = torch.tensor([number for _, number in known], dtype=torch.float64, device="cpu")
        for bucket, ks in rows.items():
            # A group's parameters follow one another in a bucket.
            span = slice(ks[0], ks[-1] + 1)
            bucket.hyper[span] = row.to(bucket.device, non_blocking=True)
            bucket.live = [entry for entry in bucket.live if entry[0] != span] + [
                (span, column, v) for column, v in enumerate(values) if isinstance(v, Tensor)
            ]
        self._mirrored[id(group)] = known

    # -- states --------------------------------------------------------------------------------

    def init_state(self) -> None:
        """Create the states of all parameters that a step may update; `step` does it when it must."""
        if any(type(group) is not ParamGroup for group in self.param_groups):
            self._adopt_groups()
        current: set[int] = set()
        new: list[Tensor] = []
        changed = False
        for group in self.param_groups:
            for param in group["params"]:
                place = self._places.get(id(param))
                if place is not None:
                    current.add(id(param))
                    bucket = place[0]
                    changed |= param.dtype != bucket.dtype or param.device != bucket.device
                elif param.requires_grad or param.grad is not None:
                    new.append(param)
        if changed or len(current) != len(self._places):
            self._rebuild()
        elif new:
            self._add_buckets(new)
        for group in self.param_groups:
            self._mirror_hyper(group, always=bool(new))

    def _add_buckets(self, params: Iterable[Tensor]) -> None:
        by_kind: dict[Any, list[Tensor]] = defaultdict(list)
        for param in params:
            small = param.numel() < self.args.min_8bit_size
            bits = 32 if small else self.args.optim_bits
            by_kind[param.device, param.dtype, bits].append(param)
        for (_, _, bits), members in by_kind.items():
            bucket = Bucket(STEP_OPS[self.rule.name, bits], members)
            self._buckets.append(bucket)
            for k, param in enumerate(members):
                self._places[id(param)] = bucket, k
                self.state[param] = bucket.views(k)

    def _rebuild(self) -> None:
        """Form the buckets anew, after parameters were replaced or moved; states are kept."""
        params = [
            param
            for group in self.param_groups
            for param in group["params"]
            if param in self.state or param.requires_grad or param.grad is not None
        ]
        old = {
            param: read_state(self.rule, "kept", param, self.state[param])
            for param in params
            if self.state.get(param)
        }
        self._buckets, self._places = [], {}
        self.state.clear()
        self._add_buckets(params)
        for param, saved in old.items():
            bucket, k = self._places[id(param)]
            bucket.write(k, saved)
        for group in self.param_groups:
            self._mirror_hyper(group)

    # -- the step ------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Inside a function that is being compiled or exported, the step becomes a part of its graph.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            The closure's result, or None.

        Raises:
            TypeError: If a gradient is sparse, or not of a dtype that a step can take; nothing has
                been changed then.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        captured = torch.compiler.is_compiling()
        if captured:
            _prepare_while_tracing(self)
        else:
            self._prepare()
        grads = [[param.grad for param in bucket.params] for bucket in self._buckets]
        for of_bucket in grads:
            for grad in of_bucket:
                if grad is not None and (grad.layout is not torch.strided or grad.dtype not in PARAM_DTYPES):
                    raise TypeError(
                        f"a gradient of {grad.dtype}, {grad.layout}: must be strided (dense) and one of "
                        f"{PARAM_DTYPES}"
                    )
        for bucket, of_bucket in zip(self._buckets, grads):
            bucket.update(of_bucket, compiled=self._compile and not captured)
        return result

    # torch's schedulers wrap the step of their optimizer in a function that Dynamo refuses to trace, to warn
    # when they are called before it. They leave alone a step that says it has been wrapped.
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

    def _prepare(self) -> None:
        self._opt_called = True  # what a scheduler's wrapper would do
        self.init_state()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, as ``torch.optim.Optimizer.zero_grad``, which Dynamo refuses to trace."""
        if torch.compiler.is_compiling():
            # Not through param_groups: Dynamo takes them for a torch optimizer's.
            _prepare_while_tracing(self)
            params = [param for bucket in self._buckets for param in bucket.params]
        else:
            params = [param for group in self.param_groups for param in group["params"]]
        for param in params:
            if param.grad is None:
                continue
            if set_to_none:
                param.grad = None
            else:
                param.grad.detach_()
                param.grad.zero_()

    # -- saving and loading --------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state as bitsandbytes lays it out, with `step` as an int for each parameter.

        Tensors are views of the live state, as torch's are: copy them before the next step changes them.
        """
        steps = {bucket: bucket.step.tolist() for bucket in self._buckets}
        saved = super().state_dict()
        params = (param for group in self.param_groups for param in group["params"])
        for index, param in enumerate(params):
            if index in saved["state"]:
                bucket, k = self._places[id(param)]
                saved["state"][index] = {**saved["state"][index], "step": int(steps[bucket][k])}
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that this optimizer or bitsandbytes saved, in place.

        Every form that bitsandbytes has written is read: flat and nested, int or tensor steps, missing
        group keys, 32-bit states for 8-bit ones and the reverse, blocks of 2048. Nothing is cast but
        what the optimizer stores in another format, and tensors may be on any device.

        Args:
            state_dict: What `state_dict` returned; it is not changed.

        Raises:
            ValueError: If it does not fit to this optimizer, which is left as it was then.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        contents, params = match_groups(self.param_groups, state_dict)
        states = {
            params[key]: read_state(self.rule, key, params[key], saved)
            for key, saved in state_dict["state"].items()
        }
        for content in contents:
            self._check_group(content)

        self.param_groups[:] = [ParamGroup(content, self) for content in contents]
        if states or self._buckets:
            self.init_state()
            missing = [param for param in states if id(param) not in self._places]
            self._add_buckets(missing)
        for bucket in self._buckets:
            bucket.reset()
        for param, saved in states.items():
            bucket, k = self._places[id(param)]
            bucket.write(k, saved)
        for group in self.param_groups:
            self._mirror_hyper(group)
        for loaded in self._optimizer_load_state_dict_post_hooks.values():
            loaded(self)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "defaults": self.defaults,
            "param_groups": [dict(group) for group in self.param_groups],
            "state": {param: dict(entry) for param, entry in self.state.items()},
            "args": self.args,
            "_compile": self._compile,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._buckets, self._places, self._mirrored = [], {}, {}
        super().__setstate__({**state, "state": defaultdict(dict, state["state"])})
        self._adopt_groups()
        if self.state:
            self._rebuild()


def _prepare_while_tracing(optimizer: AbstractOptimizer) -> int:
    # Dynamo calls this for real while it traces, so that the graph finds the arenas in place.
    optimizer._prepare()
    return 0


# What torch.compiler.assume_constant_result does, which imports Inductor only to do it.
_prepare_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]
