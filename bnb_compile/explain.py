"""What an optimizer's step is made of: buckets, formats, traffic, and the text of its kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .formats.trace import trace_format
from .ops.operator import Modes, StepOp
from .optim.base import AbstractOptimizer
from .optim.optimizer import Optimizer8bit
from .rules.trace import trace_rule
from .state.bucket import Bucket


@dataclass(frozen=True)
class BucketReport:
    """One call of a step operator: all parameters of one device, dtype, format and set of options.

    Attributes:
        device: Theirs.
        dtype: Theirs.
        parameters: How many.
        elements: Of all of them.
        operator: Name of the operator.
        formats: By name of the state: that of its format.
        compensated: States of which the parameter is given at once what rounding takes away of them.
        modes: What the kernel is compiled for besides; see `bnb_compile.ops.operator.Options`.
        state_bytes: Of the states, for each element.
        traffic: Bytes that a step reads and writes for each element, gradient in the parameter's dtype.
        operations: Arithmetic operations of a step for each element, as they are traced.
    """

    device: torch.device
    dtype: torch.dtype
    parameters: int
    elements: int
    operator: str
    formats: dict[str, str]
    compensated: tuple[str, ...]
    modes: tuple[str, ...]
    state_bytes: float
    traffic: float
    operations: int
    kind: tuple[StepOp, Modes]

    def milliseconds(self, bandwidth: float) -> float:
        """The least time of a step where memory is the limit.

        Args:
            bandwidth: Of the memory, in GB/s.
        """
        return self.elements * self.traffic / bandwidth / 1e6


class Explanation:
    """What `explain` returns; print it.

    Attributes:
        buckets: One report for each kernel call of a step.
        parameters: `Optimizer8bit.precision_report`: the format of each parameter, and why.
    """

    def __init__(self, buckets: list[BucketReport], parameters: list[dict[str, Any]]) -> None:
        self.buckets, self.parameters = buckets, parameters

    def source(self, language: str, bucket: int = 0) -> str:
        """The text of the kernel of a bucket, as it is compiled outside of a graph.

        Args:
            language: "cpp" or "triton", whatever the device.
            bucket: Which one.

        Raises:
            ValueError: If there is no such language.
        """
        op, modes = self.buckets[bucket].kind
        dtype = self.buckets[bucket].dtype
        # Imported here: Inductor and Triton are large, and an optimizer does without them until it steps.
        if language == "cpp":
            from .lowering.cpp import source as cpp

            table = "const int64_t* table, int64_t count, int64_t elements, int64_t blocks"
            rows = "const Parameter* rows = (const Parameter*)table;"
            return cpp.kernel(op, modes, "kernel", dtype, dtype, table, rows)
        if language == "triton":
            from .lowering.triton import source as triton

            fast = triton.has_fast_instructions(torch.device("cuda"))
            variant = triton.Variant(aligned=True, dims=0, long=False, fast=fast)
            return triton.IMPORTS + triton.step_kernel(op, modes, "kernel", dtype, dtype, variant)
        raise ValueError(f"Invalid language: {language!r}, must be 'cpp' or 'triton'")

    def __str__(self) -> str:
        lines = []
        for k, b in enumerate(self.buckets):
            formats = ", ".join(f"{state} {name}" for state, name in b.formats.items()) or "no states"
            lines += [
                f"bucket {k}: {b.operator}, {b.parameters} parameters, {b.elements:,} elements of "
                f"{str(b.dtype).removeprefix('torch.')} on {b.device}",
                f"  states     {formats}: {b.state_bytes:.3f} bytes a parameter",
                f"  a step     {b.traffic:.2f} bytes of traffic and {b.operations} operations an element",
            ]
            lines += [
                f"  rounding   what it takes of {', '.join(b.compensated)} is given to the parameter"
            ] * bool(b.compensated)
            lines += [f"  options    {', '.join(b.modes)}"] * bool(b.modes)
        reasons: dict[tuple[Any, str], int] = {}
        for row in self.parameters:
            key = row["format"], row["reason"]
            reasons[key] = reasons.get(key, 0) + 1
        lines += [f"{count} parameters in {name}: {why}" for (name, why), count in reasons.items()]
        return "\n".join(lines)


def explain(optimizer: Optimizer8bit) -> Explanation:
    """Say what a step of an optimizer is made of; its states are created, if they have not been.

    Args:
        optimizer: Of any class of this package, or made of a rule.

    Raises:
        TypeError: If it is another optimizer.
    """
    if not isinstance(optimizer, AbstractOptimizer):
        raise TypeError(f"explain({type(optimizer).__name__}): must be an optimizer of bnb_compile")
    optimizer.init_state()
    return Explanation(
        [_report(bucket) for bucket in optimizer.structure.buckets], optimizer.precision_report()
    )


def _report(bucket: Bucket) -> BucketReport:
    op, modes, dtype = bucket.op, bucket.kind.modes, bucket.kind.dtype
    elements = sum(param.numel() for param in bucket.local)
    names = [state.name for state in op.rule.states]
    state_bytes = sum(x.nbytes for x in bucket.arenas) / max(elements, 1)
    graphs = [trace_rule(op.rule).update]
    for stored in op.stored:
        graphs += [trace_format(stored.format).decode, trace_format(stored.format).encode]
    operations = sum(node.op == "call_function" for graph in graphs for node in graph.nodes)
    passes = 2 if modes.two_phases else 1  # a trust ratio reads everything twice
    size = dtype.itemsize
    return BucketReport(
        bucket.device,
        dtype,
        len(bucket.params),
        elements,
        op.name,
        {names[stored.state]: stored.format.name for stored in op.stored},
        tuple(names[stored.state] for stored in op.compensated(modes, dtype)),
        tuple(name for name, on in modes._asdict().items() if on != getattr(Modes(), name)),
        state_bytes,
        passes * (2 * size + state_bytes) + size + state_bytes,
        operations,
        (op, modes),
    )
