"""The base of every optimizer here, and the only one with a loop."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops.step import PARAM_DTYPES, STEP_OPS, StepOp
from ..rules import Rule
from .bucket import Bucket, Kind
from .checkpoint import flatten, match_groups, read_state
from .clipping import gradient_factors
from .family import FAMILIES, Family, flag, number
from .group import ParamGroup, StateEntry, States
from .manager import GlobalOptimManager
from .options import ARGS, PAGED_SIZE, check_args, has_managed_memory, no_compiler


class Optimizer8bit(torch.optim.Optimizer):
    """An optimizer whose states live in arenas and whose step is one kernel for each bucket.

    A bucket holds the parameters of one device, dtype and state format. States are created at the first
    step, or by `init_state`, for parameters that require a gradient or have one.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or groups of them, as for any torch optimizer.
        defaults: Hyperparameters of groups that do not have their own.
        options: See `bnb_compile.optim.Options`; and the further hyperparameters of the family.

    Raises:
        ValueError: If a hyperparameter or an option is out of its range.
        TypeError: If there is no such argument.
    """

    family: Family
    bits: ClassVar[int | None] = None  # of a class that is named for them
    paged: ClassVar[bool] = False  # of a class that is named for it

    def __init__(self, params: Any, defaults: dict[str, Any], **options: Any) -> None:
        name = type(self).__name__
        if not hasattr(self, "family"):
            raise TypeError(
                f"{name} is a base; construct Optimizer1State, Optimizer2State or a class of theirs"
            )
        self._buckets: list[Bucket] = []
        self._places: dict[int, tuple[Bucket, int]] = {}  # by id of the parameter
        self._mirrored: dict[int, tuple[tuple[int, float], ...]] = {}  # by id of the group
        self._overrides: dict[int, dict[str, Any]] = {}  # by id of the parameter
        self._overrides_version: Any = None
        #: Another text when parameters or states have been replaced: Dynamo guards a captured step by it.
        self._structure = "0"
        for key, default in self.family.extras.items():
            defaults[key] = options.pop(key, default)
        self.bf16_stochastic_round = flag(
            "bf16_stochastic_round", options.pop("bf16_stochastic_round", False)
        )
        compiled = options.pop("compile", "auto")
        self._compile = compiled if compiled == "auto" else flag("compile", compiled)
        self.max_grad_norm = options.pop("max_grad_norm", None)
        if self.max_grad_norm is not None:
            self.max_grad_norm = number("max_grad_norm", self.max_grad_norm)
        self._step_supports_amp_scaling = flag("amp_fused", options.pop("amp_fused", False))
        self.is_paged = flag("is_paged", options.pop("is_paged", self.paged))
        if self.paged and not self.is_paged:
            raise ValueError(f"{name}: is_paged=False, must be True for a class that is named for it")
        args = options.pop("args", None)
        chosen = {key: getattr(args, key, options.pop(key, off)) for key, off in ARGS.items()}
        if options:
            raise TypeError(f"{name} got unexpected arguments {sorted(options)}")
        chosen = check_args(chosen)
        if chosen["optim_bits"] not in (self.bits, 32) and self.bits is not None:
            raise ValueError(
                f"{name}: optim_bits={chosen['optim_bits']}, must be {self.bits}, or 32 (ignored)"
            )
        #: bitsandbytes' name for the options that are not per group.
        self.args = SimpleNamespace(**{**chosen, "optim_bits": self.bits or chosen["optim_bits"]})
        super().__init__(params, defaults)
        self.state: States = States(self)

    # -- groups --------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see ``torch.optim.Optimizer.add_param_group``."""
        for name, default in self.defaults.items():
            param_group.setdefault(name, default)
        param_group.update(self.family.checked(param_group))
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        for param in added["params"]:
            if param.dtype not in PARAM_DTYPES:
                self.param_groups.pop()
                raise TypeError(f"a parameter of {param.dtype}: must be one of {PARAM_DTYPES}")
            self._compiles(param.device)  # warns
        self._adopt_groups()
        self._outdate()

    def _adopt_groups(self) -> None:
        self.param_groups[:] = [
            group if type(group) is ParamGroup else ParamGroup(group, self) for group in self.param_groups
        ]

    def _mirror_hyper(self, group: dict[str, Any], always: bool = True) -> None:
        """Bring a group's hyperparameters to the tensors that the step reads, if they have changed."""
        values = self.family.hyper(group)
        # A tensor is read by every step, so only which one it is matters here.
        known = tuple((id(v), 0.0) if isinstance(v, Tensor) else (0, float(v)) for v in values)
        if not always and self._mirrored.get(id(group)) == known:
            return
        rule = self.family.rule(group)
        rows: dict[Bucket, list[int]] = defaultdict(list)
        for param in group["params"]:
            if id(param) in self._places:
                bucket, k = self._places[id(param)]
                overridden = id(param) in self._overrides
                if bucket.op.rule is not (self._rule(group, param) if overridden else rule):
                    self._outdate()
                    return  # the next step makes other states
                if overridden:
                    special = self.family.checked({**group, **self._overrides[id(param)]})
                    bucket.set_hyper([k], self.family.hyper(special))
                else:
                    rows[bucket].append(k)
        for bucket, ks in rows.items():
            bucket.set_hyper(ks, values)
        self._mirrored[id(group)] = known

    # -- states --------------------------------------------------------------------------------

    def init_state(self) -> None:
        """Create the states of all parameters that a step may update; `step` does it when it must."""
        if any(type(group) is not ParamGroup for group in self.param_groups):
            self._adopt_groups()
        current: set[int] = set()
        new = changed = False
        for group in self.param_groups:
            of_group = self.family.rule(group)
            for param in group["params"]:
                place = self._places.get(id(param))
                if place is not None:
                    rule = of_group if id(param) not in self._overrides else self._rule(group, param)
                    current.add(id(param))
                    bucket, k = place
                    entry = self.state.get(param)
                    if entry is not bucket.entries[k] or entry.replaced:
                        self._take_over(group, param)
                    kind = bucket.kind
                    changed |= (
                        param.dtype != kind.dtype
                        or param.device != kind.device
                        or param.shape != bucket.shapes[k]
                        or rule is not kind.op.rule
                    )
                elif param.requires_grad or param.grad is not None:
                    new = True
        changed |= len(current) != len(self._places)
        if self._read_overrides(always=new or changed) or changed:
            self._rebuild()
        elif new:
            self._add_buckets(lambda param: param.requires_grad or param.grad is not None)
        for group in self.param_groups:
            self._mirror_hyper(group, always=new)

    def _rule(self, group: dict[str, Any], param: Tensor) -> Rule:
        return self.family.rule({**group, **self._overrides.get(id(param), {})})

    def _take_over(self, group: dict[str, Any], param: Tensor) -> None:
        """Copy a state that was put in place of a parameter's views, or begin anew if it was removed."""
        (bucket, k), given = self._places[id(param)], self.state.get(param)
        if given:
            bucket.write(k, read_state(bucket.op.rule, "assigned", param, self.family.unpack(flatten(given))))
        else:
            bucket.begin(k, self.family.initial(self._config(group, param)))
        bucket.entries[k] = StateEntry(bucket.views(k))
        self.state.keep(param, bucket.entries[k])

    def _assign(self, param: Tensor, state: Any) -> bool:
        """Copy a state that a user assigns; returns whether the parameter has a place for it."""
        if id(param) not in self._places:
            return False
        bucket, k = self._places[id(param)]
        if state is not bucket.entries[k]:
            given = self.family.unpack(flatten(state))
            bucket.write(k, read_state(bucket.op.rule, "assigned", param, given))
        return True

    def _outdate(self) -> None:
        """Make graphs that have captured the step be captured anew."""
        self._structure = str(int(self._structure) + 1)

    def _read_overrides(self, always: bool) -> bool:
        """Ask the manager for the overrides; returns whether those of parameters with states have changed."""
        manager = GlobalOptimManager.get_instance()
        version = manager.version
        if version == self._overrides_version and not always:
            return False
        before, self._overrides = self._overrides, manager.overrides(self.param_groups)
        self._overrides_version = version
        return any(before.get(key) != self._overrides.get(key) for key in self._places)

    def _config(self, group: dict[str, Any], param: Tensor) -> dict[str, Any]:
        """A parameter's hyperparameters and options, with its overrides."""
        override = self._overrides.get(id(param), {})
        args = vars(self.args)
        config = {**group, **override}
        own = {key: config[key] for key in args if key in config}
        return {**config, **(check_args({**args, **own}) if own else args)}

    def _kind(self, config: dict[str, Any], param: Tensor) -> Kind:
        rule = self.family.rule(config)
        small = param.numel() < config["min_8bit_size"] or not rule.states
        return Kind(
            param.device,
            param.dtype,
            STEP_OPS[rule.name, 32 if small else config["optim_bits"]],
            trust=config["max_unorm"] > 0,
            skip_zeros=config["skip_zeros"],
            block_wise=config["block_wise"],
            percentile=config["percentile_clipping"],
            scaled=config["percentile_clipping"] < 100
            or self.max_grad_norm is not None
            or self._step_supports_amp_scaling,
            stochastic=self.bf16_stochastic_round and param.dtype == torch.bfloat16,
            paged=self.is_paged and has_managed_memory(param.device) and param.numel() >= PAGED_SIZE,
        )

    def _add_buckets(self, wanted: Callable[[Tensor], bool]) -> None:
        """Make states for the parameters that are wanted and have none."""
        by_kind: dict[Kind, list[tuple[Tensor, dict[str, Any]]]] = defaultdict(list)
        for group in self.param_groups:
            for param in group["params"]:
                if id(param) not in self._places and wanted(param):
                    config = self._config(group, param)
                    by_kind[self._kind(config, param)].append((param, config))
        for kind, members in by_kind.items():
            bucket = Bucket(
                kind, [param for param, _ in members], [config["max_unorm"] for _, config in members]
            )
            self._buckets.append(bucket)
            for k, (param, config) in enumerate(members):
                self._places[id(param)] = bucket, k
                given, initial = self.state.get(param), self.family.initial(config)
                if given:
                    given = self.family.unpack(flatten(given))
                    bucket.write(k, read_state(kind.op.rule, "assigned", param, given))
                elif any(initial):
                    bucket.begin(k, initial)
                self.state.keep(param, bucket.entries[k])
        if by_kind:
            self._outdate()

    def _rebuild(self) -> None:
        """Form the buckets anew, after parameters were replaced or moved; states are kept."""
        old = {}
        for group in self.param_groups:
            for param in group["params"]:
                saved, rule = self.state.get(param), self._rule(group, param)
                # A rule with other states begins anew: momentum that was switched on, for example.
                if saved and sum(key.startswith("state") for key in saved) == len(rule.states):
                    old[param] = read_state(rule, "kept", param, saved)
        kept = {id(param) for param in self.state}
        self._buckets, self._places = [], {}
        self.state.clear()
        self._add_buckets(lambda p: id(p) in kept or p.requires_grad or p.grad is not None)
        for param, saved in old.items():
            bucket, k = self._places[id(param)]
            bucket.write(k, saved)
        for group in self.param_groups:
            self._mirror_hyper(group)

    def precision_report(self) -> list[dict[str, Any]]:
        """Which parameters have 8-bit states, and why not.

        Returns:
            list[dict]: For each parameter `name` (where the optimizer was given names, else its index),
            `shape`, `numel`, `bits` of a state (None if it has none), `reason` and `bytes_per_param`.
        """
        if self._read_overrides(always=True):
            self._rebuild()
        report: list[dict[str, Any]] = []
        for group in self.param_groups:
            names = group.get("param_names") or range(len(report), len(report) + len(group["params"]))
            for name, param in zip(names, group["params"]):
                config = self._config(group, param)
                op = self._kind(config, param).op
                report.append(
                    dict(
                        name=name,
                        shape=tuple(param.shape),
                        numel=param.numel(),
                        bits=op.bits if op.rule.states else None,
                        reason=_reason(op, config, "optim_bits" in self._overrides.get(id(param), {})),
                        bytes_per_param=op.bytes_per_param(param.numel()),
                    )
                )
        return report

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
            _prepare_while_tracing(self, self._structure, GlobalOptimManager.changes)
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
        factors = gradient_factors(self._buckets, grads, self._scaler_factor(), self.max_grad_norm)
        for bucket, of_bucket, factor in zip(self._buckets, grads, factors):
            bucket.update(of_bucket, factor, compiled=not captured and self._compiles(bucket.device))
        return result

    def _compiles(self, device: torch.device) -> bool:
        return no_compiler(device.type) is None if self._compile == "auto" else self._compile

    def _scaler_factor(self) -> Tensor | None:
        """What a ``GradScaler``, or a user, asks to multiply all gradients by; NaN to skip the step."""
        factor: Tensor | None = None
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if grad_scale is not None:
            factor = 1 / torch.as_tensor(grad_scale, dtype=torch.float32)
        if found_inf is not None:
            found = torch.as_tensor(found_inf)
            factor = torch.where(found == 0, 1.0 if factor is None else factor.to(found.device), torch.nan)
        return factor

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
            _prepare_while_tracing(self, self._structure, GlobalOptimManager.changes)
            params = [param for bucket in self._buckets for param in bucket.params]
        else:
            params = [param for group in self.param_groups for param in group["params"]]
        for param in params:
            if param.grad is None:
                continue
            if set_to_none:
                param.grad = None
            else:
                if param.grad.grad_fn is not None:
                    param.grad.detach_()
                else:  # which may be a view
                    param.grad.requires_grad_(False)
                param.grad.zero_()

    # -- saving and loading --------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state as bitsandbytes lays it out, with `step` as an int for each parameter.

        Tensors are views of the live state, as torch's are: copy them before the next step changes them.
        """
        if self.state:
            self.init_state()  # something may have been assigned
        steps = {bucket: bucket.step.tolist() for bucket in self._buckets}
        saved = super().state_dict()
        params = (param for group in self.param_groups for param in group["params"])
        for index, param in enumerate(params):
            if id(param) not in self._places:
                saved["state"].pop(index, None)  # nothing but an empty entry
            elif index in saved["state"]:
                bucket, k = self._places[id(param)]
                entry = self.family.pack(saved["state"][index])
                if bucket.kind.trust:
                    entry["unorm_vec"] = bucket.step.new_zeros(1)  # bitsandbytes' scratch
                saved["state"][index] = {**entry, "step": int(steps[bucket][k])}
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
        contents = [self.family.checked(content) for content in contents]
        if self._read_overrides(always=not self._buckets):
            self._rebuild()
        rules = {id(p): self._rule(content, p) for content in contents for p in content["params"]}
        states = {
            params[key]: read_state(
                rules[id(params[key])], key, params[key], self.family.unpack(flatten(saved))
            )
            for key, saved in state_dict["state"].items()
        }

        self.param_groups[:] = [ParamGroup(content, self) for content in contents]
        if states or self._buckets:
            self.init_state()
            self._add_buckets(lambda param: param in states)
        for group in self.param_groups:
            for param in group["params"]:
                if id(param) not in self._places:
                    continue
                bucket, k = self._places[id(param)]
                if param in states:
                    bucket.write(k, states[param])
                else:
                    bucket.begin(k, self.family.initial(self._config(group, param)))
            self._mirror_hyper(group)
        for loaded in self._optimizer_load_state_dict_post_hooks.values():
            loaded(self)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "defaults": self.defaults,
            "param_groups": [dict(group) for group in self.param_groups],
            "state": {param: dict(entry) for param, entry in self.state.items()},
            "overrides": [
                (param, self._overrides[id(param)])
                for group in self.param_groups
                for param in group["params"]
                if id(param) in self._overrides
            ],
            "args": self.args,
            "family": self.family.name,
            "is_paged": self.is_paged,
            "max_grad_norm": self.max_grad_norm,
            "bf16_stochastic_round": self.bf16_stochastic_round,
            "_step_supports_amp_scaling": self._step_supports_amp_scaling,
            "_compile": self._compile,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._buckets, self._places, self._mirrored = [], {}, {}
        self._overrides, self._overrides_version = {}, None
        for param, config in state.pop("overrides"):
            GlobalOptimManager.get_instance().override_config(param, key_value_dict=config)
        family = FAMILIES[state["family"]]
        states = state.pop("state")
        self._structure = "0"
        super().__setstate__({**state, "family": family, "state": States(self)})
        for param, entry in states.items():
            self.state.keep(param, entry)
        self._adopt_groups()
        self._read_overrides(always=True)
        if self.state:
            self._rebuild()


def _reason(op: StepOp, config: dict[str, Any], overridden: bool) -> str:
    """Why a parameter has states of so many bits."""
    if not op.rule.states:
        return "the algorithm keeps no states"
    if config["optim_bits"] == 32:
        return "optim_bits=32" + overridden * " by an override"
    least = f"min_8bit_size={config['min_8bit_size']} elements"
    return f"optim_bits=8 and at least {least}" if op.bits == 8 else f"fewer than {least}"


def _prepare_while_tracing(optimizer: Optimizer8bit, *guarded: str) -> int:
    # Dynamo calls this for real while it traces, so that the graph finds the arenas in place, and again when
    # one of the texts has changed.
    optimizer._prepare()
    return 0


# What torch.compiler.assume_constant_result does, which imports Inductor only to do it.
_prepare_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _ByName(Optimizer8bit):
    """The constructor of both bases that take an `optimizer_name`."""

    moments: ClassVar[int]

    def __init__(self, optimizer_name: str, params: Any, defaults: dict[str, Any], **options: Any) -> None:
        family = FAMILIES.get(optimizer_name)
        if family is None or family.moments != self.moments:
            names = sorted(f.name for f in FAMILIES.values() if f.moments == self.moments)
            raise ValueError(f"Unsupported optimizer name: {optimizer_name}, must be one of {names}")
        for key in family.unused:
            off = {"eps": (0.0, 1e-8), "betas": ((0.0, 0.0), (0.9, 0.0))}[key]
            if defaults[key] not in off:
                raise ValueError(f"{optimizer_name} has no {key}, got {defaults[key]}, must be {off[0]}")
        self.family = family
        super().__init__(params, defaults, **options)


class Optimizer1State(_ByName):
    """An optimizer by name that bitsandbytes keeps one state for: momentum, lars, lion, rmsprop or adagrad.

    Args:
        optimizer_name: The algorithm.
        params: Parameters, ``(name, parameter)`` pairs, or groups of them.
        lr: Learning rate.
        betas: ``(momentum, dampening)``, ``(alpha, momentum)`` of RMSprop, both betas of Lion.
        eps: Added to the root of a second moment.
        weight_decay: Added to the gradient, times the parameter; decoupled in Lion.
        options: See `bnb_compile.optim.Options`; and hyperparameters of the algorithm, such as `nesterov`.
    """

    moments = 1

    def __init__(
        self,
        optimizer_name: str,
        params: Any,
        lr: float | Tensor | str = 1e-3,
        betas: Sequence[float | str] | str = (0.9, 0.0),
        eps: float | str = 1e-8,
        weight_decay: float | str = 0.0,
        **options: Any,
    ) -> None:
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(optimizer_name, params, defaults, **options)


class Optimizer2State(_ByName):
    """An optimizer by name that bitsandbytes keeps two states for: adam, lamb or ademamix.

    Args:
        optimizer_name: The algorithm.
        params: Parameters, ``(name, parameter)`` pairs, or groups of them.
        lr: Learning rate.
        betas: Decay rates of the moments, each in ``[0, 1)``; three for AdEMAMix.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled: what is taken away of a parameter, times `lr`.
        options: See `bnb_compile.optim.Options`; and hyperparameters of the algorithm, such as `amsgrad`.
    """

    moments = 2

    def __init__(
        self,
        optimizer_name: str,
        params: Any,
        lr: float | Tensor | str = 1e-3,
        betas: Sequence[float | str] | str = (0.9, 0.999),
        eps: float | str = 1e-8,
        weight_decay: float | str = 0.0,
        **options: Any,
    ) -> None:
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(optimizer_name, params, defaults, **options)
