"""Quantise and dequantise in Inductor: plain Pointwise and Reduction nodes.

The eager kernels are traced and their parts lowered in place of the operator, so that they fuse with
whatever stands around it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ..formats.dynamic8 import DynamicMap, dequantize, dynamic_map, quantize
from ..ops.blockwise import dequantize_op, quantize_op
from . import _inductor
from ._inductor import TensorBox, V, process_subgraph_nodes, register_lowering, select_decomp_table


def _inline(function: Callable[..., Any], arguments: dict[Any, Any]) -> Any:
    """Lower the parts of a tensor function in place of the operator that is being lowered.

    Args:
        function: Takes the tensors of `arguments`.
        arguments: Each argument as the traced graph knows it (a node, or a real tensor that becomes a
            constant), with what it was lowered to.
    """
    with V.fake_mode:
        examples = [
            a.meta["val"]
            if isinstance(a, torch.fx.Node)
            else torch.empty(a.shape, dtype=a.dtype, device=x.get_device())
            for a, x in arguments.items()
        ]
        graph = make_fx(function, select_decomp_table(), _allow_non_fake_inputs=True)(*examples)
    return process_subgraph_nodes(graph, list(arguments.values()))


def _dynamic_map(signed: bool) -> DynamicMap:
    return dynamic_map(signed, torch.device("cpu"))


@register_lowering(quantize_op, type_promotion_kind=None)
def _(x: TensorBox, code: TensorBox | None, block_size: int, signed: bool = True) -> Any:
    node = V.graph.current_node
    if code is not None:
        return _inline(lambda x, code: quantize(x, code, block_size), {node.args[0]: x, node.args[1]: code})
    tables, device = _dynamic_map(signed), x.get_device()
    return _inline(
        lambda x, values, outward: quantize(x, DynamicMap(signed, values, outward), block_size),
        {node.args[0]: x, **{t: _inductor.constant(t, device) for t in (tables.values, tables.outward)}},
    )


@register_lowering(dequantize_op, type_promotion_kind=None)
def _(
    codes: TensorBox,
    absmax: TensorBox,
    code: TensorBox | None,
    block_size: int,
    dtype: torch.dtype,
    signed: bool = True,
) -> Any:
    node = V.graph.current_node
    if code is None:
        values = _dynamic_map(signed).values
        table = {values: _inductor.constant(values, codes.get_device())}
    else:
        table = {node.args[2]: code}
    return _inline(
        lambda codes, absmax, values: dequantize(codes, absmax, values, block_size).to(dtype),
        {node.args[0]: codes, node.args[1]: absmax, **table},
    )
