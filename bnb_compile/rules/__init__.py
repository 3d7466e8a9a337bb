"""The algorithms: one file each, the update written once as a pure function."""

from .adam import ADAM as ADAM
from .rule import Rule as Rule
from .rule import State as State

ALL = (ADAM,)
