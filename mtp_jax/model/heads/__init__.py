"""The prediction heads: what kinds there are, and N of them in a model.

kinds   one table of the kinds, read by model, loss and decoder
stack   N heads of one kind, with what they share
linear  heads that are one matrix
"""

from mtp_jax.model.heads.kinds import KINDS, Kind
from mtp_jax.model.heads.linear import Linear
from mtp_jax.model.heads.stack import Heads, Inputs, Own

__all__ = ["KINDS", "Heads", "Inputs", "Kind", "Linear", "Own"]
