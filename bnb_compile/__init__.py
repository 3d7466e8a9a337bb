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
