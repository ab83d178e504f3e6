#!/bin/sh
# SLURM, a process for each GPU; from the repository's root:
#
#   sbatch experiments/launch/slurm.sh --config=configs/quickstart.py --workdir=/shared/x
#
# JAX reads from SLURM how many processes there are and where the first one is.
# All nodes see the workdir. SIGTERM, two minutes before the time is up, makes
# all save the same step; submit the same command again, or several times with
# --dependency=singleton, for a run that takes longer. PROGRAM is another module
# to run, such as experiments.claims.best_n.
#SBATCH --job-name=mtp_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
for attempt in 1 2 3 4 5; do  # a process that dies stops the others; go on
  srun --kill-on-bad-exit=1 "${PYTHON:-python}" -m "${PROGRAM:-experiments.train}" \
    --distributed "$@" && exit 0
  echo "attempt $attempt failed" >&2
done
exit 1
