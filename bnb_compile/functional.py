"""bitsandbytes' functional names over the operators of this package."""

from __future__ import annotations

from .ops.codebook import create_dynamic_map as create_dynamic_map
