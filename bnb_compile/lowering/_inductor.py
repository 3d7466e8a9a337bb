"""The only module that touches Inductor's private interface.

Tried with torch 2.13.0. Each name says what it is used for, so that a move upstream is mended here.
"""

from typing import Any

import torch
from torch._inductor.codecache import (
    CppPythonBindingsCodeCache as CppPythonBindingsCodeCache,  # compiles a kernel outside a graph
)
from torch._inductor.codecache import PyCodeCache as PyCodeCache  # a printed Triton kernel as a module
from torch._inductor.cpp_builder import (
    get_compiler_version_info as get_compiler_version_info,  # what machine.py tells of the compiler
)
from torch._inductor.cpp_builder import get_cpp_compiler as get_cpp_compiler  # the same
from torch._inductor.cpu_vec_isa import pick_vec_isa as pick_vec_isa  # what C++ is vectorised with
from torch._inductor.decomposition import (
    select_decomp_table as select_decomp_table,  # what lowerings expect to be left of a traced function
)
from torch._inductor.ir import ExternKernel as ExternKernel  # base of our node
from torch._inductor.ir import MutationOutput as MutationOutput  # says which buffers it writes
from torch._inductor.ir import NoneLayout as NoneLayout
from torch._inductor.ir import TensorBox as TensorBox
from torch._inductor.lowering import lowerings as lowerings  # aten.clone for functional operators
from torch._inductor.lowering import (
    process_subgraph_nodes as process_subgraph_nodes,  # lowers a traced function in an operator's place
)
from torch._inductor.lowering import register_lowering as register_lowering
from torch._inductor.runtime.cache_dir_utils import (
    cache_dir as cache_dir,  # where machine.py tries to write
)
from torch._inductor.runtime.hints import (
    DeviceProperties as DeviceProperties,  # what a Triton kernel is compiled for
)
from torch._inductor.virtualized import V as V  # the graph and the wrapper that are being built


def constant(data: torch.Tensor, device: torch.device) -> Any:
    """A tensor that the compiled graph owns, lowered."""
    return V.graph.add_tensor_constant(data.to(device))
