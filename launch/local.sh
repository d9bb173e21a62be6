#!/usr/bin/env bash
# Several processes on one machine: launch/local.sh PROCESSES fit --config configs/debug.yaml --trainer.strategy zero2
# Each process gets its share of the cores as threads, because processes that use all cores slow each other down.
set -euo pipefail
processes=${1:?usage: launch/local.sh PROCESSES COMMAND OPTIONS...}
shift
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
program=$(dirname "$0")/../.venv/bin/infini-train
[ -x "$program" ] || program=infini-train
exec "$program" "$@" --trainer.devices "$processes"
