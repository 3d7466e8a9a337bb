"""The algorithms, one file each, and the two pieces of maths around them: trust ratio and rounding."""

from .adagrad import ADAGRAD as ADAGRAD
from .adam import ADAM as ADAM
from .adam import ADAM_AMSGRAD as ADAM_AMSGRAD
from .adan import ADAN as ADAN
from .ademamix import ADEMAMIX as ADEMAMIX
from .lamb import LAMB as LAMB
from .lamb import LAMB_AMSGRAD as LAMB_AMSGRAD
from .lion import LION as LION
from .rmsprop import RMSPROP as RMSPROP
from .rounding import NEAREST as NEAREST
from .rounding import noise_of as noise_of
from .rounding import random_bits as random_bits
from .rounding import round_bits as round_bits
from .rule import Rule as Rule
from .rule import State as State
from .sgd import SGD as SGD
from .sgd import SGD_PLAIN as SGD_PLAIN
from .transforms import cautious as cautious
from .transforms import clipped_update as clipped_update
from .transforms import coupled_weight_decay as coupled_weight_decay
from .transforms import decoupled_weight_decay as decoupled_weight_decay
from .transforms import error_feedback as error_feedback
from .transforms import mars as mars
from .trust import trust_ratio as trust_ratio

ALL = (
    ADAM,
    ADAM_AMSGRAD,
    LAMB,
    LAMB_AMSGRAD,
    ADEMAMIX,
    LION,
    SGD,
    SGD_PLAIN,
    *RMSPROP.values(),
    ADAGRAD,
    ADAN,
)
