#!/usr/bin/env bash
# The batch script of launch/slurm.sh, on the first host of the job. Slurm keeps a copy of this file
# alone, so it uses nothing beside it.
#
#     slurm_job.sh --folder=DIR --code=DIR --max-restarts=N [--venv=DIR] [--container=pyxis|apptainer
#         --image=I --mount=DIR ...] (--commands=FILE | -- program argument ...)
#
# Ends with 0 (finished), 2 (a user's mistake) or the status of the last crash, which is then in
# FOLDER/exit/JOB; or asks Slurm to queue the job again.
set -uo pipefail

folder="" code="" venv="" container="" image="" commands="" max_restarts=3
mounts=() program=()
while (($#)); do
  case $1 in
    --folder=*) folder=${1#*=} ;;
    --code=*) code=${1#*=} ;;
    --venv=*) venv=${1#*=} ;;
    --container=*) container=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --mount=*) mounts+=("${1#*=}") ;;
    --commands=*) commands=${1#*=} ;;
    --max-restarts=*) max_restarts=${1#*=} ;;
    --)
      shift
      program=("$@")
      break
      ;;
  esac
  shift
done

job=$SLURM_JOB_ID
[[ -z ${SLURM_ARRAY_JOB_ID-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
nodes=$SLURM_JOB_NUM_NODES

say() { printf '[job %s, start %d] %s\n' "$job" "$((${SLURM_RESTART_COUNT:-0} + 1))" "$*"; }

# What the job ended with, for launch/slurm.sh status and whoever waits for it.
finish() {
  mkdir -p "$folder/exit" && echo "$1" >"$folder/exit/$job.new" &&
    mv "$folder/exit/$job.new" "$folder/exit/$job"
  exit "$1"
}

mistake() {
  echo "error: $*" >&2
  finish 2
}

# The same job again, in the queue. One that `launch/slurm.sh delete` stops may not be requeued.
requeue() {
  if scontrol show job --oneliner "$SLURM_JOB_ID" | grep -q ' Requeue=0 '; then
    say "$1; it is not to be queued again"
    finish "$2"
  fi
  say "$1; queued again"
  scontrol requeue "$SLURM_JOB_ID" || finish "$2"
  sleep 300 # Slurm ends this script.
  exit "$2"
}

rm -f "$folder/exit/$job"
if [[ -n $commands ]]; then
  # One line of shell words, of which nothing is expanded.
  mapfile -t program < <(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$commands" | xargs printf '%s\n')
fi
# The folders it writes to; --out may name a file in one.
outputs=()
for ((i = 0; i < ${#program[@]}; i++)); do
  case ${program[i]} in
    --workdir=* | --out=*) place=${program[i]#*=} ;;
    --workdir | --out) place=${program[i + 1]-} ;;
    *) continue ;;
  esac
  [[ $place != *.png && $place != *.npz ]] || place=$(dirname "$place")
  outputs+=("$place")
done

srun=(srun "--nodes=$nodes" "--ntasks=$nodes" --ntasks-per-node=1)
# srun takes over most of what sbatch was told, but not this; and one task is to have all of its host.
[[ -z ${SLURM_CPUS_PER_TASK-} ]] || srun+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
srun+=(--cpu-bind=none)
inside=()
case $container in
  "")
    if [[ -n $venv ]]; then
      export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH
    fi
    cd "$code" || mistake "the code $code is not visible on $(hostname): use a --folder that all hosts see"
    ;;
  pyxis)
    binds=$folder:$folder
    for mount in "${outputs[@]}" "${mounts[@]}"; do binds+=,$mount:$mount; done
    srun+=("--container-image=$image" "--container-mounts=$binds" "--container-workdir=$code")
    ;;
  apptainer)
    inside=(apptainer exec --nv --pwd "$code")
    for mount in "$folder" "${outputs[@]}" "${mounts[@]}"; do inside+=(--bind "$mount"); done
    inside+=("$image")
    ;;
esac

# Every host must see what another writes: this one leaves a mark, and all look for it.
token=.visible.$SLURM_JOB_ID
for place in "$folder" "${outputs[@]}"; do
  { mkdir -p "$place" && : >"$place/$token"; } || mistake "$place cannot be written on $(hostname)"
  # The name of a file that was just written reaches hosts of a network file system within seconds.
  # shellcheck disable=SC2016 # expanded on each host
  blind=$("${srun[@]}" "${inside[@]}" sh -c '
    for wait in 0 1 2 4; do sleep "$wait"; [ ! -e "$1" ] || exit 0; done
    echo "${SLURMD_NODENAME:-$(hostname)}"' sh "$place/$token" 2>/dev/null)
  status=$?
  rm -f "$place/$token"
  [[ -z $blind ]] ||
    mistake "$place is not visible on ${blind//$'\n'/, }: use storage that all hosts share"
  ((status == 0)) || break # A host is away, or there is no such container; srun will say so again.
done

say "$nodes host(s), ${SLURM_JOB_NODELIST-}:$(printf ' %q' "${program[@]}")"
label=()
((nodes == 1)) || label=(--label)
# Hosts need not end together (encode), and where one crashes jax.distributed ends the others.
"${srun[@]}" "${label[@]}" --wait=0 --kill-on-bad-exit=0 "${inside[@]}" "${program[@]}"
status=$?

crashes=$folder/exit/$job.crashes
case $status in # 130 and 143: ended by a signal to stop, without a word of its own.
  0 | 2)
    say "ended with status $status"
    rm -f "$crashes"
    finish $status
    ;;
  75 | 130 | 143) requeue "stopped before the end" 75 ;;
  *)
    mkdir -p "$folder/exit" && echo "$status" >>"$crashes"
    count=$(wc -l <"$crashes")
    if ((count > max_restarts)); then
      say "ended with status $status; given up after $max_restarts restarts"
      finish $status
    fi
    requeue "ended with status $status, crash $count of at most $max_restarts" "$status"
    ;;
esac
