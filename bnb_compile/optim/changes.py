"""What a step depends on, and how a change of it is noticed. This module owns the answer.

Everything is **data** that the step reads, a **guard** (an eager step looks; a captured one too, because
Dynamo evaluates `Changes.look` as a guard and compiles again when its answer is another one), or it
**raises**:

| what                                | answer                                                               |
|-------------------------------------|----------------------------------------------------------------------|
| values of parameters and gradients  | data                                                                 |
| which parameters have a gradient    | data (eager), Dynamo's guard (captured)                              |
| a gradient's strides and address    | data (eager), Dynamo's guard (captured)                              |
| a gradient's dtype                  | data (eager), Dynamo's guard (captured); raises if sparse or complex |
| a gradient's shape, device          | raises if not its parameter's                                        |
| a gradient that is negated lazily   | resolved                                                             |
| a parameter's address               | data; guard where parameters begin to overlap                        |
| a parameter's dtype, device, shape  | guard: its state moves along; with another shape it begins anew      |
| a parameter that overlaps itself    | raises, as a wrapper subclass does                                   |
| a DTensor's mesh and placements     | guard, as is its local tensor; its gradient is placed likewise       |
| requires_grad                       | guard until a parameter has a state; then its gradient counts        |
| the parameters of a group           | guard                                                                |
| the list of groups                  | guard; a parameter in no group keeps its state and is not updated    |
| hyperparameters that are numbers    | data, written at once                                                |
| hyperparameters that are tensors    | data, read by each step; guard if there is another tensor            |
| options of a group, and of `args`   | guard; data: `max_unorm` above 0, `percentile_clipping` below 100    |
| `max_grad_norm`                     | data; guard if it is switched on or off                              |
| `amp_fused`, `is_paged`, `bf16_...` | guard                                                                |
| `release_gradients`, `previous_...` | guard; raises if changed while hooks have used some gradients        |
| a gradient that a hook has used     | raises, as any use of it does                                        |
| overrides, bitsandbytes' too        | guard; hyperparameters are data                                      |
| values of a state                   | data, written at once; raises if they do not fit                     |
| a state that is taken away          | data: it begins anew, at once                                        |
| ``optimizer.state`` itself          | guard: another one has another structure                             |
| `grad_scale`, `found_inf`           | data                                                                 |

"At once" is for CUDA graphs: a replay runs no Python that could look. What is a guard above a replay cannot
notice; capture again after such a change.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch._library.opaque_object import MemberType, register_opaque_type
from torch._opaque_base import OpaqueBase

from .. import backends
from ..formats import Stored, stored_as
from ..ops.operator import Modes
from ..ops.step import step_op
from ..state import paging
from ..state.bucket import Bucket, Kind
from ..state.checkpoint import Numbers
from ..state.memory import check_parameter, waves
from ..state.portions import portions
from ..state.sharding import check_whole, ends_with_rows, geometry_of, has_blocks, local, sharding_of
from ..state.structure import Structure, Wanted
from ..state.watched import States
from .base import AbstractOptimizer
from .fitting import check_options, check_ratios
from .manager import GlobalOptimManager
from .options import ARGS, OF_BITS, PAGED_SIZE, check_args, format_of

#: Inductor of torch 2.11 copies a parameter that shares its storage with another to a wrong place.
_COMPILES_VIEWS = torch.__version__ >= "2.13"


_SPECS, _SPEC = attrgetter("shape", "dtype", "device"), attrgetter("_spec")


def params_of(groups: Iterable[Mapping[str, Any]]) -> list[Tensor]:
    """The parameters of all groups."""
    return [param for group in groups for param in group["params"]]


class Source(NamedTuple):
    """A group, or an overridden parameter of it, and the rows of hyperparameters that it fills."""

    group: Mapping[str, Any]
    override: Mapping[str, Any]
    rows: list[tuple[Bucket, list[int]]]


class Changes(OpaqueBase):
    """Notices what has changed since an optimizer's structure was formed.

    For Dynamo it is an opaque object: `look` is its guard, and `prepare` runs for real while a step is
    traced.
    """

    def __init__(self, optimizer: AbstractOptimizer) -> None:
        self._optimizer: Any = weakref.ref(optimizer)
        self._version = 0
        self._sources: list[Source] = []
        self._written: list[tuple[Any, ...]] = []  # for each source, what is in the tensors
        self._overrides: dict[int, dict[str, Any]] = {}  # by id of the parameter
        self._seen: Any = None  # what the structure was formed from
        self._placed: list[Tensor] = []  # what a step may update
        self._members: list[Tensor] = []  # what has a place, with those that are in no group now
        self._specs: Any = []
        self._addresses: Any = None
        self._sharded = False  # whether some parameter is a DTensor
        self._waiting: list[Tensor] = []  # parameters of groups that had no gradient to wait for

    def __deepcopy__(self, memo: Any) -> Changes:
        return self  # as Dynamo copies it (torch 2.11); a copied optimizer makes its own

    # Asked by steps.

    def look(self) -> str:
        """Bring data to the step's tensors, and say what the structure is.

        Returns:
            str: The same text as long as what has been traced is right.
        """
        try:
            self._refuse_to_compile_half()
            reason = self._outdated()
        except Exception as error:  # raised again where it can be seen, when the step is prepared
            reason = f"{type(error).__name__}: {error}"
        return f"structure {self._version}" + (f" is outdated: {reason}" if reason else "")

    def prepare(self) -> int:
        """Have the structure as the groups, options and states ask for it.

        Raises:
            ValueError: If a value, or what is in ``optimizer.state``, is out of range or does not fit.
            TypeError: If a parameter cannot be updated.
            RuntimeError: If the step is captured by a torch that compiles wrong code for it.
        """
        self.optimizer._opt_called = True  # what a scheduler's wrapper of `step` would do
        if TracingContext.try_get() is not None:
            self._refuse_to_compile_half()
            _forget_source_of_none()
        if self._outdated() is not None:
            self._form()
        if not _COMPILES_VIEWS and TracingContext.try_get() is not None:
            _refuse_views(self._placed)
        return 0

    def _refuse_to_compile_half(self) -> None:
        if self.optimizer.has_begun():
            raise RuntimeError(
                "release_gradients: a backward pass outside of a graph has used gradients already, so step() "
                "must be outside, too; or compile both together"
            )

    @property
    def optimizer(self) -> AbstractOptimizer:
        """Whose changes these are."""
        return self._optimizer()

    @property
    def structure(self) -> Structure:
        """The structure of ``optimizer.state``; the last one as long as that is an ordinary mapping."""
        optimizer = self.optimizer
        state = optimizer.state
        if isinstance(state, States) and state.listener.states is state:
            return state.listener
        return optimizer.structure

    @property
    def overrides(self) -> dict[int, dict[str, Any]]:
        """What a `GlobalOptimManager` sets for parameters, by id, when the structure was last looked at."""
        return self._overrides

    def seen(self) -> Any:
        """What a step depends on, but for states; of a tensor, which, and how often it was written."""
        values = [tuple(_version(v) for v in self._values(source)) for source in self._sources]
        return self._facts(), values, _version(self.optimizer.max_grad_norm)

    # As the listener of groups.

    def group_written(self, group: dict[str, Any]) -> None:
        """See `GroupListener`: write its numbers into the tensors."""
        optimizer = self._optimizer()
        if optimizer is None or not optimizer.family.is_complete(group):
            return
        optimizer.family.fold_betas(group)
        for k, source in enumerate(self._sources):
            if source.group is group and _key(self._values(source)) != self._written[k]:
                self._write(k, source)

    # Looking.

    def _outdated(self) -> str | None:
        """Why the structure is no longer right, None if it is."""
        optimizer = self.optimizer
        structure = optimizer.structure
        if optimizer.state is not structure.states:
            return "optimizer.state was replaced"
        if self._facts() != self._seen:
            return "groups or options have changed"
        if self._sharded:
            for bucket in structure.buckets:
                bucket.refresh()
        if self._look_at_specs() != self._specs:
            return "a parameter has another shape, dtype, device or placement"
        if any(param.requires_grad or param.grad is not None for param in self._waiting):
            return "a parameter without a state has a gradient, or requires one"
        if not backends.replaces_tensors() and (addresses := self._look_at_addresses()) != self._addresses:
            for param in self._placed:
                check_parameter(param)
            if _waves(self._placed) != [
                structure.places[id(param)].bucket.kind.wave for param in self._placed
            ]:
                return "parameters overlap"
            self._addresses = addresses
        if structure.touched and not structure.take_over(set(map(id, params_of(optimizer.param_groups)))):
            return "a parameter that is in no group has lost its state"
        for k, source in enumerate(self._sources):
            if _key(self._values(source)) != self._written[k]:
                tensors = _tensors(self._written[k])
                self._write(k, source)
                if _tensors(self._written[k]) != tensors:
                    return "a hyperparameter is another tensor"
        self._bring_norm()
        return None

    def _bring_norm(self) -> None:
        buckets = self.optimizer.structure.buckets
        self.optimizer.norms.bring(self.optimizer.max_grad_norm, buckets[0].device if buckets else None)

    def _look_at_specs(self) -> Any:
        if not self._sharded:
            return list(map(_SPECS, self._members))
        buckets = self.structure.buckets
        placed = [id(spec) for b in buckets if b.kind.sharding is not None for spec in map(_SPEC, b.params)]
        return [_SPECS(x) for bucket in buckets for x in bucket.local], placed

    def _look_at_addresses(self) -> Any:
        if not self._sharded:
            return _addresses(self._placed)
        return _addresses([x for bucket in self.structure.buckets for x in bucket.local])

    def _facts(self) -> Any:
        """What decides about buckets, but for the parameters themselves and their gradients."""
        optimizer = self.optimizer
        version = GlobalOptimManager.get_instance().version
        groups = [
            (
                id(group),
                tuple(map(id, group["params"])),
                optimizer.family.rule(group),
                tuple(group[key] for key in ARGS if key in group),
            )
            for group in optimizer.param_groups
        ]
        own = (
            optimizer.max_grad_norm is None,
            optimizer.is_paged,
            optimizer.bf16_stochastic_round,
            optimizer._step_supports_amp_scaling,
            optimizer.release_gradients,
            optimizer.previous_norm,
        )
        return version, groups, tuple(vars(optimizer.args).values()), own

    def _values(self, source: Source) -> tuple[Any, ...]:
        family = self.optimizer.family
        if source.override:
            return family.hyper(family.checked({**source.group, **source.override}))
        return family.hyper(source.group)

    def _write(self, k: int, source: Source) -> None:
        values = self._values(source)
        for bucket, _ in source.rows:
            check_ratios(bucket.op.rule, bucket.op.stored, {}, values)
        for bucket, rows in source.rows:
            bucket.hyper.write(k, rows, values)
        self._written[k] = _key(values)

    # Forming.

    def _form(self) -> None:
        optimizer = self.optimizer
        link = False
        if optimizer.state is not optimizer.structure.states:
            link = self._switch()
        structure = optimizer.structure
        optimizer.adopt_groups()
        facts = self._facts()
        self._read_overrides()
        structure.take_over(set(map(id, params_of(optimizer.param_groups))))
        wanted = list(self._survey())
        if structure.fits(wanted):
            structure.wanted.update((id(w.param), w) for w in wanted)
        else:
            structure.form(wanted, link)
            self._version += 1
        tensors = list(filter(None, map(_tensors, self._written)))
        self._find_sources(wanted)
        if tensors != list(filter(None, map(_tensors, self._written))):
            self._version += 1
        self._bring_norm()
        self._seen = facts
        self._placed = [w.param for w in wanted]
        self._members = [param for bucket in structure.buckets for param in bucket.params]
        self._sharded = any(bucket.kind.sharding is not None for bucket in structure.buckets)
        self._specs = self._look_at_specs()
        self._addresses = None if backends.replaces_tensors() else self._look_at_addresses()
        self._waiting = [
            param for param in params_of(optimizer.param_groups) if id(param) not in structure.places
        ]

    def _switch(self) -> bool:
        """Follow ``optimizer.state`` to another structure; returns whether its tensors must stay."""
        optimizer = self.optimizer
        state = optimizer.state
        if self.structure is not optimizer.structure:
            self._version += 1
            self._written.clear()
            self._sources.clear()
            optimizer.structure = self.structure
            return False
        if backends.is_traced() and any(
            entry and not isinstance(entry.get("step"), Tensor) for entry in state.values()
        ):
            raise ValueError(
                "a state has a number as its step, which a traced graph would repeat for ever: make it a "
                'tensor, entry["step"] = torch.tensor(entry["step"])'
            )
        self.begin_anew(state)
        return bool(state)

    def begin_anew(self, state: Mapping[Any, Any] | None = None) -> Structure:
        """Give ``optimizer.state`` a structure that has no bucket yet, and entries for it to read."""
        optimizer = self.optimizer
        self._version += 1
        self._written.clear()
        self._sources.clear()
        optimizer.structure = Structure(optimizer.key_names)
        optimizer.state = optimizer.structure.new_states(state or {})
        self._seen = None
        return optimizer.structure

    def _read_overrides(self) -> None:
        manager = GlobalOptimManager.get_instance()
        self._overrides = manager.overrides(self.optimizer.param_groups)

    def config(
        self, group: Mapping[str, Any], param: Tensor | None, override: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """A parameter's hyperparameters and checked options, with its overrides."""
        if override is None:
            override = self._overrides.get(id(param), {})
        config = dict(vars(self.optimizer.args))
        for closer in (group, override):
            if "optim_bits" in closer and "states" not in closer:
                config["states"] = None  # which would count more than bits, although it was said further away
            config.update(closer)
        return {**config, **check_args({key: config[key] for key in ARGS})}

    def check(self, group: Mapping[str, Any]) -> None:
        """Look at a group that is added, as far as it can be said without its parameters.

        Raises:
            ValueError: If its options and hyperparameters do not go together.
        """
        config = self.config(group, None, {})
        rule = self.optimizer.family.rule(config)
        stored = stored_as(config["states"] or OF_BITS[config["optim_bits"]], rule.states)
        if any(one.over is not None for one in stored):
            check_ratios(rule, stored, config, self.optimizer.family.hyper(config))

    def kind(self, config: Mapping[str, Any], param: Tensor) -> Kind:
        """What bucket a parameter is for."""
        optimizer = self.optimizer
        if optimizer.release_gradients:
            _check_release(optimizer)
        rule = optimizer.family.rule(config)
        op = step_op(rule, format_of(config, param.numel(), has_blocks(param)))
        clipped = config["percentile_clipping"] < 100
        stochastic = optimizer.bf16_stochastic_round and param.dtype == torch.bfloat16
        check_options(rule, config, op.shared_in_blocks, param.dtype)
        if op.has_ratios:
            check_ratios(rule, op.stored, config, optimizer.family.hyper(optimizer.family.checked(config)))
        modes = Modes(
            grad_scale=clipped or optimizer.max_grad_norm is not None or optimizer._step_supports_amp_scaling,
            max_unorm=config["max_unorm"] > 0,
            skip_zeros=config["skip_zeros"],
            block_wise=config["block_wise"] or not op.shared_in_blocks,
            stochastic_round=stochastic,
            rows=ends_with_rows(param, op.shared_in_blocks, stochastic or op.random),
            means=bool(rule.means),
        )
        if modes.needs_totals or clipped or optimizer.max_grad_norm is not None:
            check_whole(param)
        of = sharding_of(param)
        modes = modes._replace(totals=of is not None and modes.needs_totals)
        paged = optimizer.is_paged and param.numel() >= PAGED_SIZE and paging.available(param.device)
        return Kind(param.device, param.dtype, op, modes, clipped, paged, of)

    def _survey(self) -> Iterator[Wanted]:
        """What is wanted of each parameter that a step may update."""
        optimizer = self.optimizer
        family, states = optimizer.family, optimizer.state
        found: dict[int, Wanted] = {}
        of_group: list[tuple[dict[str, Any], Tensor]] = []
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.requires_grad or param.grad is not None or param in states:
                    check_parameter(param)
                    of_group.append((group, param))
        of_wave = _waves([param for _, param in of_group])
        if optimizer.release_gradients and any(of_wave):
            raise ValueError(
                "release_gradients with parameters that share memory: one would be updated while the "
                "backward pass still reads the other; make them one parameter, or release nothing"
            )
        numbers = {id(param): k for k, param in enumerate(params_of(optimizer.param_groups))}
        for (group, param), wave in zip(of_group, of_wave):
            config = self.config(group, param)
            kind = self.kind(config, param)._replace(wave=wave)
            placed = kind.sharding is not None or kind.modes.stochastic_round or kind.op.random
            found[id(param)] = Wanted(
                param,
                kind,
                _numbers(family.numbers_of(kind.op.rule), kind.op.stored),
                family.initial(config),
                float(config["max_unorm"]),
                config["percentile_clipping"],
                geometry_of(param, numbers[id(param)], kind.modes.rows) if placed else None,
            )
        if not optimizer.release_gradients:
            yield from found.values()
            return
        # Gradients appear from the last layer to the first.
        reverse = list(found.values())[::-1]
        params, kinds = [w.param for w in reverse], [w.kind for w in reverse]
        of_reverse = zip(reverse, portions(params, kinds, optimizer.release_gradients))
        # In a graph the first layers are stepped first: when their gradients exist, all do, so that no reader
        # of an old parameter is left that would need a copy of it.
        for w, portion in reversed(list(of_reverse)):
            yield w._replace(kind=w.kind._replace(portion=portion))

    def _find_sources(self, wanted: list[Wanted]) -> None:
        """Say which rows of which tables follow which group, and fill them."""
        optimizer = self.optimizer
        places = optimizer.structure.places
        self._sources = []
        for group in optimizer.param_groups:
            shared: dict[Bucket, list[int]] = defaultdict(list)
            for param in group["params"]:
                place = places.get(id(param))
                if place is None:
                    continue
                override = self._overrides.get(id(param))
                if override:
                    self._sources.append(Source(group, override, [(place.bucket, [place.k])]))
                else:
                    shared[place.bucket].append(place.k)
            if shared:
                rows = [(bucket, sorted(set(ks))) for bucket, ks in shared.items()]
                self._sources.append(Source(group, {}, rows))
        for bucket in optimizer.structure.buckets:
            bucket.hyper.forget_tensors()
        self._written = [()] * len(self._sources)
        for k, source in enumerate(self._sources):
            self._write(k, source)
        for bucket in optimizer.structure.buckets:
            of_bucket = [optimizer.structure.wanted[id(param)] for param in bucket.params]
            for tensor, values in (
                (bucket.max_unorm, [w.max_unorm for w in of_bucket]),
                (bucket.percentile, [w.percentile for w in of_bucket]),
            ):
                if tensor is not None:
                    tensor.copy_(torch.tensor(values, dtype=tensor.dtype, device="cpu"))


def _key(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """What hyperparameters are compared by; of a tensor, which each step reads, only which it is."""
    return tuple(("tensor", id(v)) if isinstance(v, Tensor) else float(v) for v in values)


def _version(value: Any) -> Any:
    return (id(value), value._version) if isinstance(value, Tensor) else value


def _tensors(key: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x for x in key if isinstance(x, tuple))


def _addresses(params: list[Tensor]) -> Any:
    """Where parameters are in memory: addresses, and the strides of those that are not contiguous."""
    contiguous = list(map(Tensor.is_contiguous, params))
    strides = None if all(contiguous) else [param.stride() for param in params]
    return list(map(Tensor.data_ptr, params)), strides


def _waves(params: list[Tensor]) -> list[int]:
    return [0] * len(params) if backends.replaces_tensors() else waves(list(map(local, params)))


def _numbers(numbers: Numbers, stored: Sequence[Stored]) -> Numbers:
    """How states are numbered in keys: several with one number only if they have one format."""
    formats = {one.state: one.format.name for one in stored}
    if all(len({formats[state] for state in members}) == 1 for members in numbers):
        return numbers
    return tuple((state,) for state in sorted(formats))


def _check_release(optimizer: AbstractOptimizer) -> None:
    """Raise if an option needs what is not known when the first gradients are used.

    Raises:
        ValueError: If there is one.
    """
    if optimizer._step_supports_amp_scaling:
        raise ValueError(
            "amp_fused with release_gradients: a GradScaler says whether to step when the first gradients "
            "have been used; bfloat16 needs none"
        )


def _refuse_views(params: list[Tensor]) -> None:
    storages: set[int] = set()
    for param in params:
        storage = local(param).untyped_storage()
        if storage.nbytes() and storage.data_ptr() in storages:
            raise RuntimeError(
                f"a parameter of shape {tuple(param.shape)} is a part of a tensor of which another parameter "
                f"is a part too, of which torch {torch.__version__} compiles wrong code: step outside of the "
                "graph, or use torch 2.13 or later"
            )
        storages.add(storage.data_ptr())


def _forget_source_of_none() -> None:
    """Let a graph that sets gradients to None set them to None.

    Dynamo of torch 2.13 has one object for every None, and writes into it where it has read a gradient that
    was None. The next graph, of another model, would read that place to know what None is.
    """
    none = getattr(torch._dynamo.variables.constant, "CONSTANT_VARIABLE_NONE", None)
    if none is not None:
        none.source = None


def _guarded(changes: Changes) -> list[str]:
    return [changes.look()]


def _register() -> None:
    options: dict[str, Any] = dict(guard_fn=_guarded, members={"prepare": MemberType.USE_REAL})
    try:
        register_opaque_type(Changes, typ="symbolic", **options)
    except (AssertionError, ValueError):  # as it was called before torch 2.15
        register_opaque_type(Changes, typ="reference", **options)


_register()
