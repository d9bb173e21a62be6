#!/usr/bin/env bash
# A real SLURM cluster on one Debian 12 host, for tests only: needs root, but no systemd, no slurmdbd, no GPU.
#   eval "$(up.sh)"    start it, or repair it (dead daemons, drained nodes); run it as often as you like;
#                            exports SLURM_CONF, which is all that sbatch, srun, squeue, scontrol need
# A node is `slurmd -N nX` in UTS and mount namespaces of its own: its own hostname, its own /etc/hosts (which
# knows every node), its own scratch at $B/local.  PIDs, loopback and every other file are shared with the host.
# All listens on 127.0.0.1.  Outside $B it changes nothing but the packages and /sys/fs/cgroup/freezer/slurm_nX.
set -euo pipefail
umask 022
B=${SLURM_TEST_DIR:-/tmp/infini-slurm}   # munged wants its path root-owned, world-writable only where sticky
NODES=${SLURM_TEST_NODES:-2}                  # 1 to 9
GPUS=${SLURM_TEST_GPUS:-8}                    # pretended, per node (copies of /dev/null)
CPUS=${SLURM_TEST_CPUS:-16}                   # pretended, per node
PORT=${SLURM_TEST_PORT:-16820}                # slurmctld's; slurmd n1's is the next, and so on
export SLURM_CONF=$B/etc/slurm.conf
log() { echo "up.sh: $*" >&2; }
alive() { # by its pid file; a zombie that init has not reaped yet is dead
  local p; p=$(cat "$B/run/$1.pid" 2>/dev/null) && grep -q "^$p (${1%%.*}) [^ZX]" "/proc/$p/stat" 2>/dev/null
}
ready() { [ "$(timeout 5 sinfo -h -N -p main -o '%N %t' 2>/dev/null | grep -cE ' (idle|mix|alloc|comp)$')" = "$NODES" ]; }
put() { # put FILE: standard input into it, but not under a running cluster
  local new; new=$(cat); [ "$new" != "$(cat "$1" 2>/dev/null)" ] || return 0
  ! alive slurmctld || { log "$1 would change: run down.sh first"; return 1; }
  printf '%s\n' "$new" >"$1"
}

# 1. packages: 9 of them, 3.8 MB to fetch, 14 MB on disk; Debian's own services are not used
for c in munged slurmctld slurmd srun sbatch scontrol; do
  command -v $c >/dev/null && continue
  log "installing slurm-wlm and munge"
  install() { DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge >&2; }
  install 2>/dev/null || { apt-get update -qq >&2; install; }
  break
done

# 2. configuration
mkdir -p "$B"/{etc,run,log,state,spool,gpu,local}
exec 9>"$B/run/lock"; flock 9                  # one at a time; the daemons below do not inherit it
[ -s "$B/etc/munge.key" ] || (umask 077; head -c 1024 /dev/urandom >"$B/etc/munge.key")
for ((i = 0; i < GPUS; i++)); do [ -c "$B/gpu/nvidia$i" ] || mknod "$B/gpu/nvidia$i" c 1 3; done
{ cat /etc/hosts; echo "127.0.0.1 ctl"; for ((i = 1; i <= NODES; i++)); do echo "127.0.0.1 n$i"; done; } >"$B/etc/hosts"
# proctrack/cgroup signals a step's tasks only, as real clusters do; linuxproc signals their children too
TRACK=linuxproc
if [ -w /sys/fs/cgroup/freezer/tasks ]; then
  TRACK=cgroup; printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' | put "$B/etc/cgroup.conf"
fi
put "$B/etc/gres.conf" <<<"NodeName=n[1-$NODES] Name=gpu File=$B/gpu/nvidia[0-$((GPUS - 1))] AutoDetect=off"
put "$SLURM_CONF" <<CONF
ClusterName=slurmtest
SlurmctldHost=ctl(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits cred_expire + 1 s (120 unless told; less than 5 counts as 120)
AuthInfo=socket=$B/run/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPidFile=$B/run/slurmctld.pid
SlurmctldLogFile=$B/log/slurmctld.log
SlurmdPidFile=$B/run/slurmd.%n.pid
SlurmdLogFile=$B/log/slurmd.%n.log
SlurmdSpoolDir=$B/spool/%n
StateSaveLocation=$B/state
TmpFS=$B/local
SlurmdParameters=config_overrides
ProctrackType=proctrack/$TRACK
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$B/log/jobcomp.log
MailProg=/bin/true
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
ReturnToService=2
JobRequeue=1
KillWait=5
SlurmdTimeout=15
MessageTimeout=5
UnkillableStepTimeout=120
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
GresTypes=gpu
NodeName=DEFAULT CPUs=$CPUS RealMemory=8000 Gres=gpu:$GPUS State=UNKNOWN
$(for ((i = 1; i <= NODES; i++)); do echo "NodeName=n$i NodeHostname=n$i NodeAddr=127.0.0.1 Port=$((PORT + i))"; done)
PartitionName=main Nodes=n[1-$NODES] Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=20 State=UP
PartitionName=urgent Nodes=n[1-$NODES] MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
CONF

# 3. daemons
spawn() { # spawn HOSTNAME COMMAND...; the tmpfs's name marks the node's processes for down.sh
  unshare --uts --mount --propagation private bash -c \
    'set -e; hostname "$1"; mount --bind "$2/etc/hosts" /etc/hosts
     mount -t tmpfs -o size=2g,mode=1777 "slurmtest:$1:$2" "$2/local"; cd /; shift 2; exec "$@"' \
    _ "$1" "$B" "${@:2}" >&2 </dev/null 9>&-
}
alive munged || munged --key-file="$B/etc/munge.key" --socket="$B/run/munge.socket" --pid-file="$B/run/munged.pid" \
  --seed-file="$B/run/munged.seed" --log-file="$B/log/munged.log" >&2 9>&-
alive slurmctld || spawn ctl slurmctld
for ((i = 1; i <= NODES; i++)); do
  alive "slurmd.n$i" && continue
  if [ -e "$B/run/crashed.n$i" ]; then   # a reboot ends the node's jobs at once (ReturnToService=2 would miss it)
    scontrol update nodename="n$i" state=down reason=rebooted >&2 || true; rm -f "$B/run/crashed.n$i"
  fi
  spawn "n$i" slurmd -N "n$i"
done
drained=$(timeout 5 sinfo -h -N -p main -t drain,drng -o %N 2>/dev/null | sort -u | paste -sd,) || true
[ -z "$drained" ] || scontrol update nodename="$drained" state=resume >&2 || true
end=$((SECONDS + 30)); until ready || [ $SECONDS -ge $end ]; do sleep 0.1; done
ready || { log "nodes not ready"; sinfo -N -l >&2 || true; for f in "$B"/log/slurm*.log; do echo "== $f"; tail -n 5 "$f"; done >&2; exit 1; }
echo "export SLURM_CONF=$SLURM_CONF"
