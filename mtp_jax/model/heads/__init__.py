"""The prediction heads: what kinds there are, and N of them in a model."""

from mtp_jax.model.heads.kinds import KINDS, Kind
from mtp_jax.model.heads.linear import Linear
from mtp_jax.model.heads.stack import Heads, Inputs, Own

__all__ = ["KINDS", "Heads", "Inputs", "Kind", "Linear", "Own"]
