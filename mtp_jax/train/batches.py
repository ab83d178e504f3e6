"""The batches of a run: read by each process, placed on the mesh."""

from collections.abc import Iterator

import jax

from mtp_jax import config, sharding
from mtp_jax.data import batch as batch_lib
from mtp_jax.data import pipeline


class Batches:
  """Reads the rows of this process and places whole batches on the mesh.

  Args:
    cfg: the run's settings.
    mesh: the run's devices.
    splits: the training split and the held-out split.
  """

  def __init__(
    self,
    cfg: config.Config,
    mesh: jax.sharding.Mesh,
    splits: tuple[pipeline.Packed, pipeline.Packed],
  ):
    self._cfg, self._mesh = cfg, mesh
    self._train, self._held_out = splits
    self._shard, self._shards = sharding.row_shard(mesh, jax.process_index())

  def training(self, start: int) -> Iterator[batch_lib.Batch]:
    """This process's rows of the batches after step `start`, on the host.

    Step `start` + 1 takes batch `start`: the loop counts steps from 1, the
    pipeline batches from 0.
    """
    data = self._cfg.data
    return pipeline.batches(
      self._train,
      self._batching(data.batch, data.seed),
      workers=data.workers,
      start=start,
    )

  def held_out(self, index: int) -> batch_lib.Batch:
    """Batch `index` of the held-out split, on the mesh.

    It has the rows of one microbatch, since a whole batch might not fit into
    memory.
    """
    rows = self._cfg.data.batch // self._cfg.train.accumulate
    batching = self._batching(rows, seed=0)
    return self.place(pipeline.batch_at(self._held_out, index, batching))

  def place(self, batch: batch_lib.Batch) -> batch_lib.Batch:
    """A batch on the mesh, from this process's rows of it."""
    where = sharding.batch_sharding(self._mesh)
    return jax.tree.map(
      lambda rows: jax.make_array_from_process_local_data(
        where, rows, (len(rows) * self._shards, *rows.shape[1:])
      ),
      batch,
    )

  def _batching(self, batch: int, seed: int) -> pipeline.Batching:
    """This process's rows of batches of `batch` rows."""
    return pipeline.Batching(
      batch=batch,
      seq_len=self._cfg.data.seq_len,
      reach=self._cfg.model.reach,
      seed=seed,
      shard=self._shard,
      shards=self._shards,
    )


def check(cfg: config.Config, mesh: jax.sharding.Mesh) -> None:
  """Raises ValueError if the mesh does not divide the rows of a batch."""
  rows = cfg.data.batch // cfg.train.accumulate
  devices = mesh.shape["data"]
  if rows % devices:
    raise ValueError(
      f"data.batch {cfg.data.batch} in {cfg.train.accumulate} microbatches "
      f"gives {rows} rows, not divisible by {devices} devices of axis 'data'"
    )
