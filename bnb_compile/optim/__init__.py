"""The optimizers, under bitsandbytes' names."""

from .adam import Adam as Adam
from .adam import Adam8bit as Adam8bit
from .adam import Adam32bit as Adam32bit
from .adam import AdamW as AdamW
from .adam import AdamW8bit as AdamW8bit
from .adam import AdamW32bit as AdamW32bit
from .optimizer import AbstractOptimizer as AbstractOptimizer
from .optimizer import Options as Options
