"""8-bit optimizers for compiled PyTorch training, with bitsandbytes' names."""

from . import convert as convert
from . import devices as devices
from . import export as export
from . import functional as functional
from . import optim as optim
from .explain import explain as explain
from .optim.own import optimizer as optimizer
from .optim.percentile import PercentileClipper as PercentileClipper
from .rules import Rule as Rule
from .rules import State as State


def __getattr__(name: str) -> object:
    """Say where bitsandbytes' layers are, which scripts find beside its optimizers."""
    more = ": layers are not here, import them from bitsandbytes" if name == "nn" else ""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{more}")
