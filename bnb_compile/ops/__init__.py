"""What each operation is: its schema, its eager kernel (the reference) and its fake kernel."""

if __name__ != "bnb_compile.ops":  # a second copy would register the operators without lowerings
    raise ImportError(f"import this package as bnb_compile.ops, not as {__name__}")

from . import blockwise as blockwise
from . import norms as norms
from . import step as step
