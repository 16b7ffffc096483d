#!/usr/bin/env bash
# A real Slurm on this one machine, with two pretend GPUs, for tests/command/test_slurm.py. Needs root and Debian or Ubuntu:
#   tests/slurm/start.sh         installs slurm-wlm and munge if need be, and starts the daemons
#   tests/slurm/start.sh stop    ends them
set -euo pipefail
export PATH="$PATH:/usr/sbin"
if [[ "${1:-}" == stop ]]; then
    pkill slurmctld || true
    pkill slurmd || true
    pkill munged || true
    exit
fi
if ! command -v slurmctld > /dev/null || ! command -v munged > /dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge
fi
host=$(hostname -s)
install -d -o munge -g munge -m 0755 /run/munge
install -d -o munge -g munge -m 0700 /etc/munge /var/lib/munge /var/log/munge
[[ -f /etc/munge/munge.key ]] || (umask 077 && head -c 1024 /dev/urandom > /etc/munge/munge.key)
chown munge:munge /etc/munge/munge.key
pgrep -x munged > /dev/null || su -s "$(command -v sh)" munge -c "$(command -v munged)"
install -d -o slurm -g slurm /var/spool/slurmctld /var/spool/slurmd /var/log/slurm
mkdir -p /etc/slurm
cat > /etc/slurm/slurm.conf <<CONF
ClusterName=local
SlurmctldHost=$host
SlurmUser=slurm
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=/var/log/slurm/slurmctld.log
SlurmdLogFile=/var/log/slurm/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerParameters=batch_sched_delay=1,requeue_delay=1
GresTypes=gpu
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
cat > /etc/slurm/gres.conf <<CONF
AutoDetect=off
NodeName=$host Name=gpu File=/dev/null,/dev/zero
CONF
touch /run/slurmctld.pid && chown slurm /run/slurmctld.pid
pgrep -x slurmctld > /dev/null || slurmctld
pgrep -x slurmd > /dev/null || slurmd
for _ in $(seq 30); do
    if sinfo -h -o %T 2> /dev/null | grep -qE "idle|mixed|allocated"; then
        sinfo
        exit
    fi
    sleep 1
done
echo "Slurm did not come up: see /var/log/slurm" >&2
exit 1
