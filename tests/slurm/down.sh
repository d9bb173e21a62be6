#!/usr/bin/env bash
# down.sh            stop the cluster of up.sh: cancel its jobs, end its daemons (pids of its own pid
#                          files), then whatever is left in its nodes (processes that see the node's marker mount)
# down.sh --wipe     the same, and delete queue, job ids and logs
# down.sh --crash n2 power-cut of one node: SIGKILL to all its processes; up.sh boots it again
set -uo pipefail
B=${SLURM_TEST_DIR:-/tmp/infini-slurm}
export SLURM_CONF=$B/etc/slurm.conf
node_pids() { grep -lE " slurmtest:$1:$B " /proc/[0-9]*/mountinfo 2>/dev/null | cut -d/ -f3; }
if [ "${1:-}" = --crash ]; then node_pids "$2" | xargs -r kill -9 2>/dev/null; rm -f "$B/run/slurmd.$2.pid"; : >"$B/run/crashed.$2"; exit 0; fi
if timeout 5 scontrol ping 2>/dev/null | grep -q UP; then
  timeout 5 squeue -h -o %A | sort -u | xargs -r timeout 5 scancel 2>/dev/null
  for ((t = 0; t < 40; t++)); do [ -z "$(timeout 5 squeue -h 2>/dev/null)" ] && break; sleep 0.25; done
fi
running() { grep -q "^$1 ($2) [^ZX]" "/proc/$1/stat" 2>/dev/null; }   # $1 a pid, $2 its command
pids=()
for f in "$B"/run/slurmd.*.pid "$B/run/slurmctld.pid" "$B/run/munged.pid"; do
  p=$(cat "$f" 2>/dev/null) || continue
  d=$(basename "$f" .pid); d=${d%%.*}
  running "$p" "$d" && kill "$p" && pids+=("$p $d")
done
for p in ${pids[@]+"${pids[@]}"}; do for ((t = 0; t < 100; t++)); do running $p || break; sleep 0.05; done; done
node_pids '[a-z0-9]+' | xargs -r kill -9 2>/dev/null
rm -f "$B"/run/*.pid "$B"/run/crashed.*
find /sys/fs/cgroup/freezer/slurm_n[0-9] -depth -type d -exec rmdir {} \; 2>/dev/null
if [ "${1:-}" = --wipe ]; then rm -rf "$B"/{state,spool,log}; fi
exit 0
