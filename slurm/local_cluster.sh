#!/usr/bin/env bash
# A real Slurm on this one machine, to rehearse submissions before they go to the cluster: the same sbatch files,
# queue, requeueing and preemption; only the nodes and their GPUs are pretended.
#
#   slurm/local_cluster.sh start              start it (Debian or Ubuntu, as root; installs Slurm if it is missing)
#   eval "$(slurm/local_cluster.sh env)"      sbatch, squeue, scancel ... in this shell now talk to it
#   sbatch slurm/train.sbatch papermill_runs/params/tiny.yaml
#   slurm/local_cluster.sh status             nodes and queue;  health: run a job through it
#   slurm/local_cluster.sh stop               cancel all jobs and end the daemons;  restart: stop and start
#   slurm/local_cluster.sh install            packages alone
#
# Everything lies in $LOCAL_CLUSTER_DIR, every daemon listens on 127.0.0.1 only, start does nothing when it runs.
# Partitions: debug (default), hpg-b200, and urgent, whose jobs preempt (requeue) those of the others. Settings:
#   LOCAL_CLUSTER_DIR    /tmp/local_cluster    several clusters may run beside each other: give each its folder ...
#   LOCAL_CLUSTER_PORT   16817                 ... and its ports: this one and the next NODES, with ACCT +100 and +101
#   LOCAL_CLUSTER_NODES  2                     pretended nodes n1, n2, ...
#   LOCAL_CLUSTER_CPUS   64                    of each; like MEM (megabytes, 2000000) and GPUS (8) they need not exist
#   LOCAL_CLUSTER_ACCT   0                     1: accounting by MariaDB as well, so that sacct answers
set -euo pipefail

dir=${LOCAL_CLUSTER_DIR:-/tmp/local_cluster}
port=${LOCAL_CLUSTER_PORT:-16817}
nodes=${LOCAL_CLUSTER_NODES:-2}
cpus=${LOCAL_CLUSTER_CPUS:-64}
mem=${LOCAL_CLUSTER_MEM:-2000000}
gpus=${LOCAL_CLUSTER_GPUS:-8}
acct=${LOCAL_CLUSTER_ACCT:-0}
host=$(hostname -s)
export SLURM_CONF=$dir/etc/slurm.conf
export PATH=$PATH:/usr/sbin:/sbin # where Debian puts the daemons

say() { echo "local_cluster: $*" >&2; }
usage() { sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p}' "$0"; }

# ---------------------------------------------------------------- packages
missing_packages() {
  local pair
  for pair in slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client munged:munge; do
    command -v "${pair%%:*}" >/dev/null || echo "${pair##*:}"
  done
  [ "$acct" = 1 ] || return 0
  # the server's core alone: the full package would replace others
  for pair in slurmdbd:slurmdbd mariadbd:mariadb-server-core my_print_defaults:mariadb-client-core; do
    command -v "${pair%%:*}" >/dev/null || echo "${pair##*:}"
  done
  ls /usr/lib/*/slurm*/accounting_storage_mysql.so >/dev/null 2>&1 || echo slurm-wlm-mysql-plugin
}

install_packages() {
  local wanted
  wanted=$(missing_packages)
  [ -n "$wanted" ] || return 0
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    say "missing: $(echo $wanted); as root: apt-get install --no-install-recommends $(echo $wanted)"
    return 1
  fi
  say "installing $(echo $wanted)"
  apt-get update -qq >&2
  DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends $wanted >&2
}

# ---------------------------------------------------------------- configuration
write_configuration() {
  mkdir -p "$dir"/{etc,run,log,state,munge,dev}
  chmod 755 "$dir" "$dir"/{etc,run,log,state,munge}
  local i
  for i in $(seq "$nodes"); do mkdir -p "$dir/spool/n$i"; done
  if [ ! -s "$dir/munge/munge.key" ]; then
    (umask 077 && dd if=/dev/urandom of="$dir/munge/munge.key" bs=1 count=1024 status=none)
  fi
  local gpu_lines="" node_gpus=""
  rm -f "$dir/etc/gres.conf"
  if [ "$gpus" -gt 0 ]; then
    # Slurm wants a device file for each GPU: null devices of our own stand for /dev/nvidia*.
    for i in $(seq 0 $((gpus - 1))); do [ -e "$dir/dev/gpu$i" ] || mknod -m 666 "$dir/dev/gpu$i" c 1 3; done
    echo "NodeName=n[1-$nodes] Name=gpu Type=b200 File=$dir/dev/gpu[0-$((gpus - 1))] Flags=nvidia_gpu_env" > "$dir/etc/gres.conf"
    gpu_lines="GresTypes=gpu" node_gpus="Gres=gpu:b200:$gpus"
  fi
  cat > "$SLURM_CONF" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/run/munge.socket
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd-%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd-%n.log
# without systemd and cgroups
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
$(accounting_lines)
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/log/jobcomp.txt
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
# jobs start at once, and what has ended stays visible for a day
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0,batch_sched_delay=0,defer_batch=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PriorityType=priority/basic
MinJobAge=86400
MaxArraySize=1001
JobRequeue=1
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdTimeout=20
SlurmctldTimeout=60
MessageTimeout=30
# lets nodes have more processors, memory and GPUs than this machine
SlurmdParameters=config_overrides
$gpu_lines
NodeName=n[1-$nodes] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + nodes))] CPUs=$cpus Boards=1 SocketsPerBoard=1 CoresPerSocket=$cpus ThreadsPerCore=1 RealMemory=$mem $node_gpus State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=REQUEUE GraceTime=5
PartitionName=hpg-b200 Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=REQUEUE GraceTime=5
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF
CONF
  if [ "$nodes" = 1 ]; then sed -i "s/n\[1-1\]/n1/; s/Port=\[[0-9-]*\]/Port=$((port + 1))/" "$SLURM_CONF" "$dir"/etc/gres.conf; fi
  if [ "$gpus" = 1 ]; then sed -i 's/gpu\[0-0\]/gpu0/' "$dir/etc/gres.conf"; fi
  [ "$acct" = 1 ] || return 0
  cat > "$dir/etc/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=$dir/run/munge.socket
DbdHost=$host
DbdAddr=127.0.0.1
DbdPort=$((port + 101))
SlurmUser=root
LogFile=$dir/log/slurmdbd.log
PidFile=$dir/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((port + 100))
StorageUser=root
StorageLoc=slurm_acct
CommunicationParameters=NoInAddrAny
CONF
  chmod 600 "$dir/etc/slurmdbd.conf"
}

accounting_lines() {
  if [ "$acct" != 1 ]; then
    echo "JobAcctGatherType=jobacct_gather/none"
    echo "AccountingStorageType=accounting_storage/none"
    return
  fi
  echo "JobAcctGatherType=jobacct_gather/linux"
  echo "JobAcctGatherFrequency=task=2"
  echo "AccountingStorageType=accounting_storage/slurmdbd"
  echo "AccountingStorageHost=127.0.0.1"
  echo "AccountingStoragePort=$((port + 101))"
  echo "AccountingStoragePass=$dir/run/munge.socket"
  echo "AccountingStorageTRES=gres/gpu"
}

# ---------------------------------------------------------------- daemons
running() { # pid file, name: the process of the pid file lives and is the one we mean
  local pid
  [ -s "$1" ] && pid=$(cat "$1") && [ -r "/proc/$pid/comm" ] && [[ $(cat "/proc/$pid/comm") == "$2"* ]]
}

wait_for() { # seconds, command...
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $end ] || return 1
    sleep 0.2
  done
}

end_daemon() { # pid file, name
  if running "$1" "$2"; then
    local pid
    pid=$(cat "$1")
    kill "$pid" 2>/dev/null || true
    wait_for 10 bash -c "! kill -0 $pid" || kill -9 "$pid" 2>/dev/null || true
  fi
  rm -f "$1"
}

fail() { # message, log file
  say "$1"
  tail -n 20 "$2" >&2 || true
  return 1
}

start_munge() {
  running "$dir/run/munged.pid" munged && return
  rm -f "$dir"/run/munge.socket* "$dir/run/munged.pid"
  munged --force --key-file="$dir/munge/munge.key" --socket="$dir/run/munge.socket" --num-threads=2 \
    --pid-file="$dir/run/munged.pid" --log-file="$dir/log/munged.log" --seed-file="$dir/munge/munged.seed"
  wait_for 10 munge --socket="$dir/run/munge.socket" -n || fail "munged does not answer" "$dir/log/munged.log"
}

start_accounting() {
  [ "$acct" = 1 ] || return 0
  if ! running "$dir/run/mariadbd.pid" mariadbd; then
    local options=(--no-defaults --datadir="$dir/db" --user=root)
    [ -d "$dir/db/mysql" ] || mariadb-install-db "${options[@]}" --auth-root-authentication-method=normal \
      --skip-test-db > "$dir/log/mariadb-install.log" 2>&1
    # no grants: it listens on 127.0.0.1 and holds nothing but the accounting of this rehearsal
    setsid mariadbd "${options[@]}" --skip-grant-tables --bind-address=127.0.0.1 --port=$((port + 100)) \
      --socket="$dir/run/mysql.sock" --pid-file="$dir/run/mariadbd.pid" --innodb-buffer-pool-size=64M \
      --innodb-log-file-size=16M --innodb-lock-wait-timeout=900 --max-allowed-packet=16M \
      > "$dir/log/mariadbd.log" 2>&1 < /dev/null &
    wait_for 60 bash -c "exec 3<>/dev/tcp/127.0.0.1/$((port + 100))" || fail "mariadbd does not answer" "$dir/log/mariadbd.log"
  fi
  if ! running "$dir/run/slurmdbd.pid" slurmdbd; then
    slurmdbd
    wait_for 60 sacctmgr -n list cluster || fail "slurmdbd does not answer" "$dir/log/slurmdbd.log"
  fi
  sacctmgr -n list cluster | grep -qw local || sacctmgr -i add cluster local >/dev/null
}

all_nodes_up() {
  scontrol ping | grep -q 'is UP' && ! sinfo -h -N -o '%t' | grep -q '\*' &&
    [ "$(sinfo -h -N -o '%N %t' | sort -u | grep -cE ' (idle|mix|alloc|comp)$')" -ge "$nodes" ]
}

start() {
  [ "$(id -u)" = 0 ] || { say "needs root: its daemons run jobs as their users"; return 1; }
  install_packages
  if running "$dir/run/slurmctld.pid" slurmctld && all_nodes_up 2>/dev/null; then
    say "is up"
    return
  fi
  end_daemons
  write_configuration
  start_munge
  start_accounting
  slurmctld -i
  local i
  for i in $(seq "$nodes"); do slurmd -N "n$i"; done
  wait_for 30 scontrol ping || fail "slurmctld does not answer" "$dir/log/slurmctld.log"
  # nodes that an earlier failure drained, which the state folder remembers
  scontrol update NodeName="$(sinfo -h -o %N -p debug)" State=RESUME 2>/dev/null || true
  wait_for 30 all_nodes_up || fail "not all nodes come up" "$dir/log/slurmd-n1.log"
  say "up: $(sinfo -h -o '%P %D %t' | tr '\n' ';')"
}

health() {
  all_nodes_up || fail "unhealthy: $(sinfo -h -N -o '%N %t' 2>&1 | sort -u | tr '\n' ';')" "$dir/log/slurmctld.log"
  timeout 60 srun -Q -n1 -p urgent true
  say "healthy"
}

end_daemons() {
  local file
  for file in "$dir"/run/slurmd-*.pid; do [ ! -e "$file" ] || end_daemon "$file" slurmd; done
  end_daemon "$dir/run/slurmctld.pid" slurmctld
  end_daemon "$dir/run/slurmdbd.pid" slurmdbd
  end_daemon "$dir/run/mariadbd.pid" mariadbd
  end_daemon "$dir/run/munged.pid" munged
}

stop() {
  if running "$dir/run/slurmctld.pid" slurmctld; then # jobs first, so that none outlives its daemons
    scancel -u "$(id -un)" 2>/dev/null || true
    wait_for 25 bash -c '[ -z "$(squeue -h -t R,CG)" ]' || true
  fi
  end_daemons
  say "stopped"
}

case "${1:---help}" in
  start) # no && here: within it, bash would go on after a failure
    start
    health
    ;;
  stop) stop ;;
  restart)
    stop
    start
    health
    ;;
  status)
    scontrol ping
    sinfo -N -l
    squeue
    ;;
  health) health ;;
  install) install_packages ;;
  env) echo "export SLURM_CONF=$SLURM_CONF" ;;
  -h | --help) usage ;;
  *)
    usage >&2
    exit 2
    ;;
esac
