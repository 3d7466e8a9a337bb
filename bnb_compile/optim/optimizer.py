"""The base of every optimizer here, and the only one with a loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import backends
from ..formats import FORMATS
from ..state.bucket import Bucket
from ..state.gradients import Gradients, collect
from ..state.memory import check_parameter
from ..state.sharding import is_sharded
from ..state.structure import Structure
from ..state.watched import ParamGroup
from ..validate import flag, integer, number
from . import saving
from .base import AbstractOptimizer
from .changes import Changes, params_of
from .clipping import NormLimit, gradient_factors, gradient_norms
from .family import Family
from .options import ARGS, read_args
from .release import MeasuringNorm, Release


class Optimizer8bit(AbstractOptimizer):
    """An optimizer whose states live in arenas and whose step is one kernel for each bucket.

    A bucket holds the parameters of one device, dtype and state format. States are created at the first
    step, or by `init_state`, for parameters that require a gradient or have one; those of DTensors with the
    optimizer. What a step depends on, and
    how a change of it is noticed, is said in `bnb_compile.optim.changes`.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or groups of them, as for any torch optimizer.
        defaults: Hyperparameters of groups that do not have their own.
        options: See `bnb_compile.optim.Options`; and the further hyperparameters of the family.

    Raises:
        ValueError: If a hyperparameter or an option is out of its range, or a parameter overlaps itself.
        TypeError: If there is no such argument, or a parameter cannot be updated.

    Attributes:
        args: bitsandbytes' name for the options that are not per group.
        structure: The buckets of parameters with states, and where each one is.
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
        for key, default in self.family.extras.items():
            defaults[key] = options.pop(key, default)
        self.bf16_stochastic_round = flag(
            "bf16_stochastic_round", options.pop("bf16_stochastic_round", False)
        )
        compiled = options.pop("compile", "auto")
        self._compile = compiled if compiled == "auto" else flag("compile", compiled)
        self.previous_norm = flag("previous_norm", options.pop("previous_norm", False))
        self.release_gradients = _checked_release(options.pop("release_gradients", False))
        self.max_grad_norm = options.pop("max_grad_norm", None)
        if self.max_grad_norm is not None:
            self.max_grad_norm = number("max_grad_norm", self.max_grad_norm)
        elif self.previous_norm:
            raise ValueError(f"{name}: previous_norm=True, must be False without max_grad_norm")
        self._step_supports_amp_scaling = flag("amp_fused", options.pop("amp_fused", False))
        self.is_paged = flag("is_paged", options.pop("is_paged", self.paged))
        if self.paged and not self.is_paged:
            raise ValueError(f"{name}: is_paged=False, must be True for a class that is named for it")
        given = {key: options.pop(key) for key in ARGS if key in options}
        chosen = read_args(options.pop("args", None), given)
        if options:
            raise TypeError(f"{name} got unexpected arguments {sorted(options)}")
        self.args = SimpleNamespace(**self._for_class(chosen))
        self.begin()
        super().__init__(params, self.family.defaults(defaults))
        self.state = self.structure.new_states({})
        if any(is_sharded(param) and not param.is_meta for param in params_of(self.param_groups)):
            # torch.distributed.checkpoint takes a step to create states that do not exist.
            self.init_state()

    def _for_class(self, chosen: dict[str, Any]) -> dict[str, Any]:
        """The options of a class that is named for its bits."""
        if self.bits is None:
            return chosen
        name = type(self).__name__
        if chosen["optim_bits"] not in (self.bits, 32):
            raise ValueError(
                f"{name}: optim_bits={chosen['optim_bits']}, must be {self.bits}, or 32 (ignored)"
            )
        if chosen["states"] is not None and (bits := FORMATS[chosen["states"]].bits) != self.bits:
            raise ValueError(f"{name}: states={chosen['states']!r} has {bits} bits, must have {self.bits}")
        return {**chosen, "optim_bits": self.bits}

    def begin(self) -> None:
        """Have no states and no history of changes."""
        self.structure = Structure(self.key_names)
        self._changes = Changes(self)
        self._release = Release(self, self._changes)
        self.norms = NormLimit()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see ``torch.optim.Optimizer.add_param_group``."""
        for name, default in self.defaults.items():
            if name not in self.family.betas or "betas" not in param_group:
                param_group.setdefault(name, default)
        param_group.update(self.family.checked(param_group))
        super().add_param_group(param_group)
        for name in self.family.betas:  # they are in `betas`
            self.param_groups[-1].pop(name, None)
        try:
            self._changes.check(self.param_groups[-1])
            for param in self.param_groups[-1]["params"]:
                check_parameter(param)
                self._compiles(param.device)  # warns
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self.adopt_groups()

    def adopt_groups(self) -> None:
        """Make every group a dict that tells of a user's writes."""
        if any(
            type(group) is not ParamGroup or group.listener is not self._changes
            for group in self.param_groups
        ):
            self.param_groups[:] = [ParamGroup(group, self._changes) for group in self.param_groups]
        if self.release_gradients:
            self._release.watch(params_of(self.param_groups))

    def init_state(self) -> None:
        """Create the states of all parameters that a step may update; `step` does it when it must."""
        self._changes.prepare()

    @property
    def overrides(self) -> dict[int, dict[str, Any]]:
        """What a `GlobalOptimManager` sets for parameters, by id."""
        return self._changes.overrides

    def precision_report(self) -> list[dict[str, Any]]:
        """Which parameters have states of how many bits, and why; nothing is changed.

        Returns:
            list[dict]: For each parameter `name` (where the optimizer was given names, else its index),
            `shape`, `numel`, `bits` of a state (None if it has none), `format`, `reason` and
            `bytes_per_param`.
        """
        return saving.precision_report(self, self._changes)

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
            ValueError: If a gradient has not its parameter's shape, or something has changed to a value that
                is out of range; likewise.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        began = not torch.compiler.is_compiling() and self._release.end()
        self._changes.prepare()
        if not began:
            self.bring_links(inwards=True)
        self.update_buckets(self.structure.buckets)
        self.bring_links(inwards=False)
        known = self.norms.known
        if known is not None:
            if self.previous_norm and known.seen and not known.measured:
                known.end(only_finite=True)
            known.measured = False
        if self.release_gradients:
            for bucket in self.structure.buckets:
                for k, param in enumerate(bucket.params):
                    if k not in bucket.idle:
                        param.grad = None
        return result

    def measuring_norm(self) -> MeasuringNorm:
        """A context in which gradients are only measured: `max_grad_norm` is compared with their norm next.

        With ``release_gradients`` the norm must be known before the first gradient is used::

            with optimizer.measuring_norm():
                loss_of(model).backward()
            loss_of(model).backward()
            optimizer.step()

        Raises:
            ValueError: If `max_grad_norm` is None.
        """
        if self.max_grad_norm is None:
            raise ValueError("measuring_norm() without max_grad_norm: there is nothing to compare it with")
        return MeasuringNorm(self, self._release)

    @torch.no_grad()
    def measure_buckets(self, buckets: Sequence[Bucket]) -> None:
        """See `AbstractOptimizer`."""
        for bucket in buckets:
            grads = collect(bucket.params, bucket.specs, bucket.idle, bucket.kind.sharding)
            if self.norms.known is None or all(grad is None for grad in grads.tensors):
                continue
            self.norms.known.add(bucket.whole(gradient_norms(grads.tensors, bucket.device).square()))
            for param in bucket.params:
                param.grad = None

    @torch.no_grad()
    def end_of_measuring(self) -> None:
        """See `AbstractOptimizer`."""
        self._changes.prepare()
        self.measure_buckets(self.structure.buckets)
        known = self.norms.known
        if known is None or not known.seen:
            raise RuntimeError("measuring_norm(): no gradient has come, of which there is a norm")
        known.end(only_finite=False)
        known.measured = True

    def check_ended(self, what: str) -> None:
        """See `AbstractOptimizer`."""
        self._release.check_ended(what)

    def has_begun(self) -> bool:
        """See `AbstractOptimizer`."""
        return bool(self._release.stepped)

    def bring_links(self, inwards: bool) -> None:
        """See `AbstractOptimizer`."""
        for view, given in self.structure.links:
            if inwards:
                view.copy_(given)
            else:
                given.copy_(view)

    def update_buckets(self, buckets: Sequence[Bucket]) -> None:
        """See `AbstractOptimizer`."""
        grads = [collect(b.params, b.specs, b.idle, b.kind.sharding) for b in buckets]
        tensors = [of_bucket.tensors for of_bucket in grads]
        known, limit = self.norms.known, self.norms.limit
        if known is not None and not (known.measured or self.previous_norm):
            known = None
        if self.release_gradients and limit is not None and known is None:
            raise RuntimeError(
                "max_grad_norm with release_gradients: the norm of all gradients is known when the first of "
                "them have been freed. Use previous_norm=True, or a backward pass in measuring_norm() "
                "before, or percentile_clipping or max_unorm in its place"
            )
        factors = gradient_factors(buckets, tensors, self._scaler_factor(), limit, known)
        for bucket, of_bucket, factor in zip(buckets, grads, factors):
            self._update(bucket, of_bucket, factor)

    def _update(self, bucket: Bucket, grads: Gradients, factor: Tensor | None) -> None:
        if torch.compiler.is_compiling():
            bucket.update(grads, factor, compiled=False)
            return
        compiled = self._compiles(bucket.device) and not backends.replaces_tensors()
        if compiled:
            try:
                bucket.compile(grads, scaled=factor is not None)
            except backends.CompileError as error:
                if self._compile is True:
                    raise
                backends.give_up(bucket.device.type, str(error))
                compiled = False
        bucket.update(grads, factor, compiled)

    def _compiles(self, device: torch.device) -> bool:
        """Whether steps on a device are to run the compiled kernel; warns if they cannot."""
        if device.type == "meta":
            return False
        return backends.why_uncompiled(device.type) is None if self._compile == "auto" else self._compile

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

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, as ``torch.optim.Optimizer.zero_grad``, which Dynamo refuses to trace."""
        if torch.compiler.is_compiling():
            # Not through param_groups: Dynamo takes them for a torch optimizer's.
            self._changes.prepare()
            params = [param for bucket in self.structure.buckets for param in bucket.params]
        else:
            params = params_of(self.param_groups)
            self._release.check_ended("zero_grad()")
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

    def state_dict(self) -> dict[str, Any]:
        """The state as bitsandbytes lays it out, with `step` as an int for each parameter.

        Tensors are views of the live state, as torch's are: copy them before the next step changes them.
        The states of a DTensor are DTensors, and copies; then all processes must call this, where the shards
        of a later dimension are no multiples of 256 elements.
        States of parameters that are in no group are not saved, as they have no index.
        """
        return saving.state_dict(self, self._changes)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that this optimizer or bitsandbytes saved, in place.

        Every form that bitsandbytes has written is read: flat and nested, int or tensor steps, missing
        group keys, 32-bit states for 8-bit ones and the reverse, blocks of 2048. Nothing is cast but
        what the optimizer stores in another format, and tensors may be on any device.

        Args:
            state_dict: What `state_dict` returned; it is not changed.

        Raises:
            ValueError: If it is damaged or does not fit to this optimizer, which is left as it was then.
        """
        saving.load_state_dict(self, self._changes, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return saving.getstate(self, self._changes)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "family" in state:
            saving.setstate(self, state)
        else:  # as torch's optimizers are given a part of theirs
            saving.replace(self, state)


def _checked_release(value: Any) -> bool | int:
    """The option `release_gradients`."""
    try:
        return flag("release_gradients", value)
    except ValueError:
        most = integer("release_gradients", value)
        if most < 0:
            raise ValueError(f"Invalid release_gradients: {most}, must be a number of bytes") from None
        return most
