"""Random arguments for the step operators, the same for the same seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnb_compile.formats import FORMATS, Slot, layout
from bnb_compile.ops.operator import Arguments, Modes, StepOp
from bnb_compile.ops.step import parts_of, step_op
from bnb_compile.rules import ADAM, ALL, LION, RMSPROP, cautious, clipped_update, mars
from bnb_compile.state.checkpoint import encode

#: Tensors with values in another than row-major order, or with gaps between them.
STRIDED: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: torch.randn(40, 33).t(),
    "channels_last": lambda: torch.randn(3, 5, 7, 9).to(memory_format=torch.channels_last),
    "every other": lambda: torch.randn(700)[::2],
    "columns": lambda: torch.randn(30, 50)[:, 3:40],
    "permuted": lambda: torch.randn(6, 7, 8, 9).permute(2, 0, 3, 1),
}
#: Gradients may also overlap themselves.
EXPANDED: dict[str, Callable[[], Tensor]] = {
    "expanded scalar": lambda: torch.randn(()).expand(19, 31),
    "expanded row": lambda: torch.randn(31).expand(19, 31),
    "expanded column": lambda: torch.randn(19, 1).expand(19, 31),
}


#: The range of each hyperparameter; flags are 0 or 1, and half of the parameters have no schedule.
RANGES = {
    "gamma": (0.01, 0.05),
    "lr": (1e-3, 1e-2),
    "beta1": (0.8, 0.95),
    "beta2": (0.99, 0.9999),
    "beta3": (0.999, 0.9999),
    "momentum": (0.8, 0.95),
    "dampening": (0.0, 0.5),
    "alpha": (0.9, 0.99),
    "eps": (1e-8, 1e-6),
    "weight_decay": (0.1, 0.2),
    "lr_decay": (1e-4, 1e-3),
    "t_alpha": (-1000.0, 1000.0),
    "t_beta3": (-1000.0, 1000.0),
    "nesterov": (0, 1),
    "bias_correction": (0, 1),
    "adam_w_mode": (0, 1),
}
OF_RULE = {"ademamix": {"alpha": (2.0, 8.0)}}
# Without bias correction and with little but weight decay in a gradient, a small eps only magnifies rounding.
OF_RULE |= {rule.name: {"eps": (1e-3, 1e-2)} for rule in RMSPROP.values()}

#: What a step with all its options is compiled for.
EVERYTHING = Modes(grad_scale=True, max_unorm=True, skip_zeros=True, block_wise=False)


class Bucket(NamedTuple):
    """Arguments of a step operator."""

    params: list[Tensor]
    grads: list[Tensor | None]
    arenas: list[Tensor]
    step: Tensor
    hyper: Tensor
    options: dict[str, Any]  # the keyword arguments

    @property
    def arguments(self) -> tuple:
        return self.params, self.grads, *self.arenas, self.step, self.hyper

    @property
    def state(self) -> list[Tensor]:
        """What a step changes besides the parameters."""
        return [*self.arenas, self.step]

    def call(self, function: Callable[..., Any]) -> Any:
        """Call an operator, or a function of the same arguments."""
        return function(*self.arguments, **self.options)

    def launch(self, launcher: type, op: StepOp) -> None:
        """Step by a Launcher."""
        dtypes = {grad.dtype for grad in self.grads if grad is not None}
        launch = launcher(op, Arguments.of(self.arguments, self.options))
        for dtype in dtypes:
            launch(self.grads, dtype)


def make(
    op: StepOp,
    shapes: Sequence[tuple[int, ...] | Tensor],
    param_dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype | None = None,
    without_grad: Sequence[int] = (),
    seed: int = 0,
    grads: Sequence[Tensor] | None = None,
    modes: Modes | None = None,
    first: bool = False,
) -> Bucket:
    """Arguments in the middle of a training run.

    Args:
        op: The operator.
        shapes: Of the parameters, or the parameters.
        param_dtype: Of the parameters that are given by their shape.
        grad_dtype: Of the gradients; by default that of the parameters.
        without_grad: Indices of the parameters that have no gradient.
        seed: Of the random numbers.
        grads: The gradients, if they shall not be random.
        modes: What the step is asked for. Of four parameters or more, the last two have a `grad_scale` that
            is not finite, the one before them a `max_unorm` of 0. With `skip_zeros`, some gradients are zero.
        first: Whether it is the first step, before which all states are zero.
    """
    torch.manual_seed(seed)
    modes = modes or Modes()
    params = [s if isinstance(s, Tensor) else torch.randn(s, dtype=param_dtype) for s in shapes]
    if grads is None:
        grads = [(0.1 * torch.randn(p.shape)).to(grad_dtype or p.dtype) for p in params]
        if modes.skip_zeros:
            grads = [torch.where(torch.rand(g.shape) < 0.2, 0.0, g).to(g.dtype) for g in grads]
    places = layout(p.numel() for p in params)
    arenas = []
    for arena, shape in zip(op.arenas, op.shapes(places)):
        if not arena.part.dtype.is_floating_point:
            x = torch.randint(0, 256, shape, dtype=torch.uint8).view(arena.part.dtype)
        else:
            x = 0.1 * torch.rand(shape)
            for row, stored in zip(x, (s for s in op.stored if arena.name.startswith(s.format.name))):
                if op.rule.states[stored.state].nonnegative:
                    row.mul_(10).pow_(4).mul_(0.1)
                elif arena.part.per == 1:
                    row.mul_(torch.randn(shape[1]).sign())
            x = x.to(arena.part.dtype)
        arenas.append(x.zero_() if first else x)
    if needs_states(op) and not first:
        for slot in places.slots:
            fill(op, arenas, slot)
    n = len(params)
    step = torch.zeros(n, dtype=torch.int64) if first else torch.randint(1, 1000, (n,))
    ranges = RANGES | OF_RULE.get(op.rule.name, {})
    columns = []
    for field in op.rule.hyper._fields:
        low, high = ranges[field]
        column = low + (high - low) * torch.rand(n, dtype=torch.float64)
        columns.append(column.round() if isinstance(high, int) else column.clamp(min=0))
    flags = "skip_zeros", "block_wise", "stochastic_round"
    options: dict[str, Any] = {name: getattr(modes, name) for name in flags}
    if modes.grad_scale:
        options["grad_scale"] = 0.5 + torch.rand(n)
        if n >= 4:
            options["grad_scale"][-2:] = torch.tensor([math.nan, math.inf])
    if modes.max_unorm:
        options["unorm"] = torch.zeros(n)
        options["max_unorm"] = 0.1 * torch.rand(n)
        if n >= 4:
            options["max_unorm"][-3] = 0
    grads = [None if k in without_grad else g for k, g in enumerate(grads)]
    return Bucket(params, grads, arenas, step, torch.stack(columns, 1), options)


def needs_states(op: StepOp) -> bool:
    """Whether random entries of an operator's arenas would stand for no states."""
    return any(part.name == "low" for stored in op.stored for part in stored.format.parts)


def fill(op: StepOp, arenas: Sequence[Tensor], slot: Slot) -> None:
    """Give a parameter states that steps could have left."""
    root = 0.1 * torch.rand(slot.numel) ** 3
    values = [
        root.square() if state.nonnegative else root * torch.randn(slot.numel).clamp(-3, 3)
        for state in op.rule.states
    ]
    fresh = encode(op.stored, values, slot)
    for stored in op.stored:
        for name, view in parts_of(op, arenas, stored, slot).items():
            view.copy_(fresh[stored.state][name])


#: Sizes around those of blocks and vectors.
SIZES = [(0,), (1,), (255,), (256,), (257,), (264,), (4095,), (4096,), (4097,), (), (16, 40)]
FEW_SIZES = [(0,), (), (4104,)]


class Awkward(NamedTuple):
    """A bucket with every size and layout, and where to find what."""

    bucket: Bucket
    without_grad: int
    unusable: int  # the parameter with gradients that must not be used,
    places: list[int]  # and where it has them


def awkward(
    op: StepOp,
    param_dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype | None = None,
    modes: Modes | None = None,
    sizes: Sequence[tuple[int, ...]] = SIZES,
    seed: int = 0,
) -> Awkward:
    """The same for the same arguments; also one parameter that is zero, and so has no norm."""
    torch.manual_seed(seed)
    grad_dtype = grad_dtype or param_dtype
    strided = [STRIDED[name]() for name in ("transposed", "channels_last", "every other")]
    expanded = EXPANDED["expanded row"]().to(grad_dtype)
    rest = [(300,), (512,), (72,), expanded.shape, (40,), (257,)]
    shapes = [*sizes, *(x.to(param_dtype) for x in strided), *rest]
    without_grad = len(shapes) - len(rest)
    b = make(op, shapes, param_dtype, grad_dtype, without_grad=[without_grad], seed=seed, modes=modes)
    channels_last = len(sizes) + 1
    b.grads[channels_last] = b.grads[channels_last].to(memory_format=torch.channels_last)
    b.grads[-3] = expanded[:1].expand(expanded.shape)
    unusable, places = without_grad + 1, [3, 300, 301, 511]
    b.grads[unusable][places] = torch.tensor([math.nan, math.inf, -math.inf, 1e30]).to(grad_dtype)
    b.params[unusable + 1].zero_()
    return Awkward(b, without_grad, unusable, places)


def copy(bucket: Bucket) -> Bucket:
    """A copy that keeps strides, also of tensors that overlap themselves."""

    def same_layout(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage().clone())
        return storage.as_strided(x.shape, x.stride(), x.storage_offset())

    return torch.utils._pytree.tree_map(same_layout, bucket)


def assert_close(op: StepOp, actual: Bucket, expected: Bucket, rate: float = 1e-4) -> None:
    """Both results of a step are equal except for rounding.

    Codes may be one apart where rounding decides, for at most `rate` of them; everything else may differ
    by a few units in the last place of what was added.
    """
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
    magnified = 0.0  # share of the parameters' elements that may differ by more
    if op.has_ratios:  # what a code that is one apart takes away is added to the parameter
        tolerance[torch.float32], magnified = 5e-6, 2e-3
    if any(state.name == "previous_grad" for state in op.rule.states):
        # 16-bit gradients tie more often than averages of them, and differences of gradients cancel.
        rate, tolerance[torch.float32], magnified = 10 * rate, 5e-6, 3e-3
    for a, e in zip(actual.params, expected.params, strict=True):
        allowed = tolerance[e.dtype]
        least = 1e-6 if e.dtype == torch.float32 else allowed
        if magnified and e.numel():
            apart = (a.double() - e.double()).abs() > least + allowed * e.abs()
            assert apart.sum() <= max(1, magnified * e.numel())
            a = torch.where(apart, e, a)
        torch.testing.assert_close(a, e, rtol=allowed, atol=least)
    for arena, a, e in zip(op.arenas, actual.arenas, expected.arenas, strict=True):
        if arena.part.dtype.itemsize == 1:
            if arena.part.dtype.is_floating_point:
                a, e = a.view(torch.uint8), e.view(torch.uint8)
            unpacked = arena.part.unpacked if arena.part.packed else Tensor.int
            apart = (unpacked(a) - unpacked(e)).abs()
            assert apart.numel() == 0 or apart.max() <= 1, f"{arena.name}: {apart.max()} codes apart"
            assert apart.sum() <= max(2, rate * apart.numel()), f"{arena.name}: {apart.sum()} codes differ"
        else:
            for x, y in zip(a.float(), e.float()):
                largest = y.abs().max().item() if y.numel() else 0.0  # sums may cancel
                rtol = 1e-5 if arena.part.dtype == torch.float32 else tolerance[arena.part.dtype]
                torch.testing.assert_close(x, y, rtol=rtol, atol=1e-6 * largest)
    assert torch.equal(actual.step, expected.step)


OTHER_FORMATS = [
    ("adam", "dynamic8sr"),
    ("adam", "float8"),
    ("adam", "ratio8"),
    ("adam", "ratio4_8"),
    ("adam", "ratio4"),
    ("adam_amsgrad", "ratio8"),
    ("ademamix", "ratio4"),
    ("adagrad", "ratio4"),
    ("normalised_cautious_adam", "ratio8"),
    ("clipped_lion", "dynamic8"),
    ("mars_adam", "dynamic8"),
]
#: By the rule's name and the bits of a state: every rule with 8 and with 32 bits, two in bfloat16.
STEP_OPS = {
    (rule.name, bits): step_op(rule, format)
    for rule in ALL
    for bits, format in ((8, "dynamic8"), (16, "bfloat16"), (32, "float32"))
    if (rule.states or bits == 32) and (bits != 16 or rule.name in ("adam", "ademamix"))
}
#: Rules that take a mean over a parameter.
OF_MEANS = [cautious(ADAM, normalised=True), clipped_update(LION, 0.5), mars(ADAM)]
#: By the rule's name and that of a format.
OTHER_OPS = {
    (rule.name, format): step_op(rule, format)
    for rule in [*ALL, *OF_MEANS]
    for format in FORMATS
    if (rule.name, format) in OTHER_FORMATS
}


def bits_of(op: StepOp) -> int:
    """Of a state in one of the formats of STEP_OPS that are named by their bits."""
    sizes = [part.dtype.itemsize for stored in op.stored for part in stored.format.of_elements]
    return 8 * sizes[0] if sizes else 32
