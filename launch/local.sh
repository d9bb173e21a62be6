#!/usr/bin/env bash
# One machine, several processes: launch/local.sh PROCESSES fit --config configs/debug.yaml --trainer.strategy zero2 ...
# Threads are shared out among the processes: two that use all cores would spin against each other.
set -euo pipefail
processes=${1:?usage: launch/local.sh PROCESSES COMMAND OPTIONS...}
shift
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
program=$(dirname "$0")/../.venv/bin/infini-train
[ -x "$program" ] || program=infini-train
exec "$program" "$@" --trainer.devices "$processes"
