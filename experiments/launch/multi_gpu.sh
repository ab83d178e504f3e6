#!/bin/sh
# One host with several GPUs, a process for each; from the repository's root:
#
#   experiments/launch/multi_gpu.sh 8 --config=configs/quickstart.py --workdir=runs/x
#
# One process drives all GPUs of a host as well, without this script; a process
# for each helps where one Python cannot feed them. SIGTERM and Ctrl-C go to
# all: they save the same step. On a CPU (JAX_PLATFORMS=cpu) it tries out what
# several hosts do. PYTHON is the interpreter, PROGRAM another module to run,
# such as experiments.claims.best_n.
set -u
count=$1
shift
python=${PYTHON:-python}
port=$("$python" -c 'import socket
s = socket.socket()
s.bind(("", 0))
print(s.getsockname()[1])')

pids=
trap 'kill -TERM $pids 2>/dev/null' TERM INT
process=0
while [ "$process" -lt "$count" ]; do
  JAX_LOCAL_DEVICE_IDS=$process "$python" -m "${PROGRAM:-experiments.train}" \
    --coordinator="localhost:$port" --num_processes="$count" \
    --process_id="$process" "$@" &
  pids="$pids $!"
  process=$((process + 1))
done

code=0
for pid in $pids; do
  alive=yes
  while [ "$alive" ]; do  # a signal that is passed on ends `wait` early
    wait "$pid"
    status=$?
    kill -0 "$pid" 2>/dev/null || alive=
  done
  [ "$status" -eq 0 ] || code=$status
done
[ "$code" -eq 0 ] || echo "a process ended with $code; the same command goes on" >&2
exit "$code"
