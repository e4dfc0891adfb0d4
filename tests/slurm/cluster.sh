#!/usr/bin/env bash
# A Slurm cluster of two nodes on this machine, for tests: munged, slurmctld and two slurmd with all their files in FOLDER.
#
#   cluster.sh install          Debian's packages (as root)
#   cluster.sh start FOLDER     afterwards `export SLURM_CONF=FOLDER/slurm.conf` reaches it
#   cluster.sh stop FOLDER      with all its jobs
set -euo pipefail
PATH="$PATH:/usr/sbin"

if [ "${1:-}" = install ]; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends slurmctld slurmd slurm-client munge
    exit
fi
[ $# = 2 ] || { sed -n '2,7p' "$0" >&2; exit 2; }
folder=$(realpath -m "$2")

export SLURM_CONF="$folder/slurm.conf"

stop() {
    scancel --user="$(id -un)" || true
    for _ in {1..100}; do
        [ -n "$(squeue --noheader)" ] || break
        sleep 0.1
    done
    for name in "slurmd-$(hostname)" slurmd-localhost slurmctld munged; do
        pid=$(cat "$folder/$name.pid" 2>/dev/null || true)
        [ -n "$pid" ] || continue
        kill "$pid" || true
        while kill -0 "$pid" 2>/dev/null; do sleep 0.1; done
    done
}

start() {
    mkdir -p "$folder"/{state,gpus}
    chmod 755 "$folder"
    head -c 1024 /dev/urandom > "$folder/munge.key"
    chmod 400 "$folder/munge.key"
    munged --key-file "$folder/munge.key" --socket "$folder/munge" --pid-file "$folder/munged.pid" \
        --log-file "$folder/munged.log" --seed-file "$folder/munge.seed"

    # Two names of this machine are two nodes. Their "GPUs" are files: Slurm counts them, and nothing computes on them.
    touch "$folder"/gpus/{0,1}
    echo "Name=gpu File=$folder/gpus/[0-1]" > "$folder/gres.conf"
    read -r -a ports < <(python3 -c '
import socket
all = [socket.create_server(("", 0)) for _ in range(3)]
print(*[each.getsockname()[1] for each in all])')
    cat > "$folder/slurm.conf" <<END
ClusterName=test
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
# A requeued job waits until its old credentials have expired.
AuthInfo=socket=$folder/munge,cred_expire=5
StateSaveLocation=$folder/state
SlurmctldPidFile=$folder/slurmctld.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmdSpoolDir=$folder/spool-%n
SlurmdLogFile=$folder/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=5
GresTypes=gpu
NodeName=$(hostname) NodeAddr=127.0.0.1 Port=${ports[1]} CPUs=8 Gres=gpu:2
NodeName=localhost NodeAddr=127.0.0.1 Port=${ports[2]} CPUs=8 Gres=gpu:2
PartitionName=usual Nodes=ALL Default=YES PriorityTier=1
PartitionName=urgent Nodes=ALL PriorityTier=2
END
    slurmctld -c
    slurmd -N "$(hostname)"
    slurmd -N localhost
    for _ in {1..100}; do
        [ "$(sinfo --noheader --states=idle --format=%D 2>/dev/null)" != 2 ] || exit 0
        sleep 0.1
    done
    tail -n 5 "$folder"/*.log >&2
    sinfo >&2
    exit 1
}

"$1"
