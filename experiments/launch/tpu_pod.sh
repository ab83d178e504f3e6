#!/bin/sh
# A TPU slice of several hosts, the same command on each; from your own machine:
#
#   TPU=my-slice ZONE=us-east5-a experiments/launch/tpu_pod.sh \
#     --config=configs/quickstart.py --workdir=/mnt/shared/x
#
# Needs gcloud; on every host the repository, installed (BUILD.md, Install), in
# ~/mtp_jax; and a workdir that all hosts see: a Filestore share, or a bucket
# mounted with gcsfuse. JAX asks the slice how many processes there are. The
# same command goes on after a preemption. PROGRAM is another module to run, such
# as experiments.claims.best_n.
set -eu
flags=
for flag; do  # quoted for the shell of the host
  flags="$flags '$(printf %s "$flag" | sed "s/'/'\\\\''/g")'"
done
gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="
  cd mtp_jax && ${PYTHON:-python3} -m ${PROGRAM:-experiments.train} \
    --distributed$flags"
