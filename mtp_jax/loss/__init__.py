"""The multi-token loss: its targets, its three implementations.

batch            targets, and the loss of a batch, also under a frozen trunk
implementations  the loss over the heads: formula, checkpointed, serial
cross_entropy    fused with the unembedding, in blocks of positions
"""

from mtp_jax.loss.batch import (
  Settings,
  frozen_loss,
  future_targets,
  token_loss,
)
from mtp_jax.loss.cross_entropy import Targets
from mtp_jax.loss.implementations import (
  IMPLEMENTATIONS,
  checkpointed,
  formula,
  serial,
)

__all__ = [
  "IMPLEMENTATIONS",
  "Settings",
  "Targets",
  "checkpointed",
  "formula",
  "frozen_loss",
  "future_targets",
  "serial",
  "token_loss",
]
