"""bitsandbytes' functional names over the operators of this package, for 8 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .formats.codebook import create_dynamic_map as create_dynamic_map
from .ops.blockwise import dequantize_op, quantize_op

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def _table(values: Tensor) -> Tensor:
    """The values ascending, with zeros up to 256, in float32."""
    return torch.nn.functional.pad(values, (0, 256 - len(values))).sort().values.float()


def create_linear_map(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> Tensor:
    """Values of the linear map, ascending: equal steps from -1 (or 0) to 1.

    It differs from bitsandbytes' where that is not ascending: an unsigned map of less than 8 bits has its
    padding first and not in the middle, and the zero of a signed map is 0, where linspace gives -3e-8.

    Args:
        signed: Whether the map has negative values.
        total_bits: Bits of a code, 1 to 8; with a sign at least 2.
        add_zero: Whether a signed map gives up one of its ``2**total_bits`` values so that zero is one
            of them. With less than 8 bits it always does.

    Returns:
        Tensor: ``(256,)`` float32, padded with zeros.

    Raises:
        ValueError: If there is no such map.
    """
    if not 1 + signed <= total_bits <= 8:
        raise ValueError(f"total_bits must be {1 + signed} to 8 with {signed=}, got {total_bits}")
    count = 2**total_bits - (signed and (add_zero or total_bits < 8))
    values = torch.linspace(-float(signed), 1.0, count, dtype=torch.float32, device="cpu")
    if signed and count % 2:
        values[count // 2] = 0
    return _table(values)


def create_fp8_map(
    signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2, total_bits: int = 8
) -> Tensor:
    """Values of a small floating-point format, ascending and divided by the largest.

    Args:
        signed: Whether the format has a sign bit.
        exponent_bits: Bits of the exponent, at least 1.
        precision_bits: Bits of the fraction.
        total_bits: Bits of a code, at most 8: sign, exponent and fraction.

    Returns:
        Tensor: ``(256,)`` float32, padded with zeros where `total_bits` is less than 8.

    Raises:
        ValueError: If the bits do not add up, or there is no such format.
    """
    if exponent_bits < 1 or precision_bits < 0 or total_bits > 8:
        raise ValueError(
            "exponent_bits must be at least 1, precision_bits at least 0 and total_bits at most 8, "
            f"got {exponent_bits=}, {precision_bits=}, {total_bits=}"
        )
    if signed + exponent_bits + precision_bits != total_bits:
        raise ValueError(
            "total_bits must be the sum of sign, exponent and precision bits, "
            f"got {signed=}, {exponent_bits=}, {precision_bits=}, {total_bits=}"
        )
    fractions = [i / 2**precision_bits for i in range(2**precision_bits)]
    # Scaled so that the highest binade is [1, 2). bitsandbytes gives the subnormals 2**-bias, not the
    # exponent of the lowest binade, which is four times as large.
    values = [fraction * 2.0 ** -(2**exponent_bits) for fraction in fractions]
    values += [(1 + fraction) * 2.0**-i for i in range(2**exponent_bits - 1) for fraction in fractions]
    magnitudes = torch.tensor(values, dtype=torch.float64, device="cpu") / max(values)
    return _table(torch.cat([magnitudes, -magnitudes]) if signed else magnitudes)


def create_normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> Tensor:
    """Quantiles of the normal distribution, ascending and divided by the largest: NF4 by default.

    Published with "QLoRA: Efficient Finetuning of Quantized LLMs" (https://arxiv.org/abs/2305.14314).

    Args:
        offset: Probability below the largest quantile, between 0.5 and 1.
        use_extra_value: Whether there are 8 positive values and 7 negative ones, or 7 of each.

    Returns:
        Tensor: ``(256,)`` float32, padded with zeros.

    Raises:
        ValueError: If `offset` is not inside its range.
    """
    if not 0.5 < offset < 1:
        raise ValueError(f"offset must be between 0.5 and 1, got {offset}")

    def quantiles(count: int) -> Tensor:
        # The probabilities are float32 in bitsandbytes; what follows from them is exact before it is rounded.
        p = torch.linspace(offset, 0.5, count + 1, dtype=torch.float32, device="cpu")[:-1]
        return torch.special.ndtri(p.double()).float()

    values = torch.cat([quantiles(8 if use_extra_value else 7), -quantiles(7)])
    return _table(values / values.max())


class QuantState:
    """What `quantize_blockwise` returns beside the codes, and `dequantize_blockwise` needs.

    Args:
        absmax: ``(blocks,)`` float32, the scale of each block; if nested uint8, the codes of
            ``absmax - offset``.
        shape: Kept for the caller; the codes have their own.
        code: ``(256,)`` float32, the map. None is the signed dynamic map.
        blocksize: Elements that share a scale.
        quant_type: None, which is 8 bits; bitsandbytes' "nf4" and "fp4" are not here.
        dtype: What to decode to: float32, float16 or bfloat16.
        offset: ``()`` float32, the mean of the scales, if nested.
        state2: How `absmax` was quantised, if nested.

    Raises:
        ValueError: If `quant_type` is not None, or one of `offset` and `state2` is.
    """

    def __init__(
        self,
        absmax: Tensor,
        shape: torch.Size | None = None,
        code: Tensor | None = None,
        blocksize: int = 4096,
        quant_type: None = None,
        dtype: torch.dtype = torch.float32,
        offset: Tensor | None = None,
        state2: QuantState | None = None,
    ) -> None:
        if quant_type is not None:
            raise ValueError(f"quant_type must be None, which is 8 bits, got {quant_type!r}")
        if (offset is None) != (state2 is None):
            raise ValueError(f"a nested state has both offset and state2, got {offset=}, {state2=}")
        self.absmax = absmax
        self.shape = shape
        self.code = _dynamic_code(absmax.device) if code is None else code
        self.blocksize = blocksize
        self.quant_type = quant_type
        self.dtype = dtype
        self.offset = offset
        self.state2 = state2

    @property
    def nested(self) -> bool:
        """Whether `absmax` itself is quantised."""
        return self.state2 is not None

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The state as tensors, numbers and strings, with bitsandbytes' keys.

        Args:
            packed: What is not a tensor is packed into one, but only for 4 bits: 8-bit states are the
                same either way, as in bitsandbytes.
        """
        state: dict[str, Any] = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            "quant_map": self.code,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": None if self.shape is None else tuple(self.shape),
        }
        if self.offset is not None and self.state2 is not None:
            state |= {
                "nested_absmax": self.state2.absmax,
                "nested_blocksize": self.state2.blocksize,
                "nested_quant_map": self.state2.code,
                "nested_dtype": str(self.state2.dtype).removeprefix("torch."),
                "nested_offset": self.offset.item(),
            }
        return state

    @classmethod
    def from_dict(cls, qs_dict: dict[str, Any], device: torch.device | str) -> QuantState:
        """The state that `as_dict`, here or in bitsandbytes, made the dictionary of.

        Args:
            qs_dict: Keys may have prefixes that end in a dot. Not changed.
            device: Where the tensors shall be.

        Raises:
            ValueError: If keys are missing or unknown, as those of a packed 4-bit state are, or a dtype is
                not one of the three.
        """
        state = {key.rpartition(".")[2]: value for key, value in qs_dict.items()}
        expected = {"quant_type", "absmax", "blocksize", "quant_map", "dtype", "shape"}
        if any(key.startswith("nested_") for key in state):
            expected |= {f"nested_{key}" for key in ("absmax", "blocksize", "quant_map", "dtype", "offset")}
        if state.keys() != expected:
            raise ValueError(f"an 8-bit state has the keys {sorted(expected)}, got {sorted(qs_dict)}")

        def part(prefix: str) -> dict[str, Any]:
            name = state[f"{prefix}dtype"]
            if name not in _DTYPES:
                raise ValueError(f"{prefix}dtype must be one of {', '.join(_DTYPES)}, got {name!r}")
            return {
                "absmax": state[f"{prefix}absmax"].to(device),
                "code": state[f"{prefix}quant_map"].to(device),
                "blocksize": state[f"{prefix}blocksize"],
                "dtype": _DTYPES[name],
            }

        offset = state2 = None
        if "nested_offset" in state:
            offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device=device)
            state2 = cls(**part("nested_"))
        shape = None if state["shape"] is None else torch.Size(state["shape"])
        quant_type = state["quant_type"]
        return cls(**part(""), shape=shape, quant_type=quant_type, offset=offset, state2=state2)

    def to(self, device: torch.device | str) -> None:
        """Move the tensors to a device, in place."""
        self.absmax = self.absmax.to(device)
        self.code = self.code.to(device)
        if self.offset is not None and self.state2 is not None:
            self.offset = self.offset.to(device)
            self.state2.to(device)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantState):
            return NotImplemented
        mine, theirs = self.as_dict(), other.as_dict()
        return mine.keys() == theirs.keys() and all(
            torch.equal(value, theirs[key]) if isinstance(value, Tensor) else value == theirs[key]
            for key, value in mine.items()
        )


def _dynamic_code(device: torch.device) -> Tensor:
    """The operators' default map, which is theirs to cache, read by decoding every code."""
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    scale = torch.ones(1, dtype=torch.float32, device=device)
    return dequantize_op(codes, scale, None, 256, torch.float32)


def _check_blocksize(blocksize: int) -> None:
    if blocksize <= 0:
        raise ValueError(f"blocksize must be positive, got {blocksize}")


def _check_code(code: Tensor) -> None:
    valid = code.dtype == torch.float32 and code.shape == (256,)
    # A graph cannot look at the values, and on a GPU looking means waiting for it.
    if valid and code.device.type == "cpu" and not torch.compiler.is_compiling():
        valid = bool((code[:-1] <= code[1:]).all())
    if not valid:
        raise ValueError(f"code must be 256 ascending float32 values, got {code}")


def _check_buffer(name: str, buffer: Tensor | None, result: Tensor) -> None:
    if buffer is not None and (buffer.dtype != result.dtype or buffer.shape != result.shape):
        raise ValueError(
            f"{name} must be {result.dtype} of shape {tuple(result.shape)}, "
            f"got {buffer.dtype} of shape {tuple(buffer.shape)}"
        )


@torch.no_grad()
def quantize_blockwise(
    A: Tensor,
    code: Tensor | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> tuple[Tensor, QuantState]:
    """Quantise a tensor to 8 bits, with one scale for each block of elements.

    The nearest value is found exactly, and a tie goes to the lower code. Gradients do not flow.

    Args:
        A: Any shape, float32, float16 or bfloat16.
        code: ``(256,)`` float32, ascending, the map; on the CPU and outside of graphs the order is
            checked. None is the signed dynamic map.
        absmax: ``(blocks,)`` float32 (uint8 if `nested`), where to write the scales; becomes the state's.
        out: Shape of `A`, uint8, where to write the codes.
        blocksize: Elements that share a scale, in logical order; the last block may be smaller.
        nested: Whether to quantise the scales too: what differs from their mean, with the dynamic map
            and the same `blocksize`.

    Returns:
        tuple[Tensor, QuantState]: The codes, uint8 of the shape of `A` (`out`, if given), and what
        `dequantize_blockwise` needs.

    Raises:
        ValueError: If an argument has the wrong dtype, shape or value; then no buffer has changed.
    """
    _check_blocksize(blocksize)
    if A.dtype not in _DTYPES.values():
        raise ValueError(f"Blockwise quantization only supports 16/32-bit floats, but got {A.dtype}")
    if code is not None:
        _check_code(code)
        code = code.to(A.device, copy=True)
    codes, scales = quantize_op(A, code, blocksize)
    offset = state2 = None
    if nested:
        offset = scales.mean() if scales.numel() else scales.new_zeros(())
        scales, state2 = quantize_blockwise(scales - offset, blocksize=blocksize)
    _check_buffer("out", out, codes)
    _check_buffer("absmax", absmax, scales)
    if out is not None:
        codes = out.copy_(codes)
    if absmax is not None:
        scales = absmax.copy_(scales)
    state = QuantState(scales, code=code, blocksize=blocksize, dtype=A.dtype, offset=offset, state2=state2)
    return codes, state


@torch.no_grad()
def dequantize_blockwise(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> Tensor:
    """Decode what `quantize_blockwise` made.

    Args:
        A: Any shape, uint8, the codes.
        quant_state: The state that came with them. `absmax`, `code` and `blocksize` are for calls without
            it and ignored beside it, as in bitsandbytes.
        absmax: ``(blocks,)`` float32, the scales.
        code: ``(256,)`` float32, the map. None is the signed dynamic map.
        out: Shape of `A`, dtype of the result, where to write it.
        blocksize: Elements that share a scale.
        nested: Need not be given: `quant_state` knows whether it is nested. True demands that it is.

    Returns:
        Tensor: Shape of `A`, dtype of the state, or float32 without one; `out`, if given.

    Raises:
        ValueError: If an argument is missing or has the wrong dtype, shape or value; then `out` has not
            changed.
    """
    if quant_state is None and absmax is None:
        raise ValueError("dequantize_blockwise requires either quant_state or absmax")
    if A.dtype != torch.uint8:
        raise ValueError(f"A must be uint8, got {A.dtype}")
    if nested and (quant_state is None or not quant_state.nested):
        raise ValueError("nested=True needs a nested quant_state, with offset and state2")
    dtype = torch.float32
    if quant_state is not None:
        absmax, code = quant_state.absmax, quant_state.code
        blocksize, dtype = quant_state.blocksize, quant_state.dtype
        if quant_state.offset is not None:
            absmax = dequantize_blockwise(absmax, quant_state.state2) + quant_state.offset
    _check_blocksize(blocksize)
    code = None if code is None else code.to(A.device)
    decoded = dequantize_op(A, absmax, code, blocksize, dtype)
    _check_buffer("out", out, decoded)
    return decoded if out is None else out.copy_(decoded)
