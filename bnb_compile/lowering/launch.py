from .cpp.launch import *  # noqa
from .cpp.launch import CompiledStep, compile_kernel  # noqa
