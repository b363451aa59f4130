#!/usr/bin/env bash
# Runs a program on this machine, with all its GPUs, in the background; see launch/host.sh --help and
# docs/launch.md.
# shellcheck source=launch/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'USAGE'
launch/host.sh start  [options] -- python -m dydilit_jax.train --config=... --workdir=/data/runs/xl
launch/host.sh status (--folder=DIR | --workdir=DIR)
launch/host.sh logs   (--folder=DIR | --workdir=DIR) [--follow]
launch/host.sh delete (--folder=DIR | --workdir=DIR) [--now]

start runs one process that has all GPUs of this machine. It goes on when the terminal is closed, and is
started again after a crash, from its last checkpoint. Prints the number of the process that watches it.
delete tells it to save and end, and waits for that; with --now it ends at once, without saving.

  --dry-run            print, as a shell script, all that would be run
  --folder=DIR         where the log and the program's state are (WORKDIR/launch)
  --code=here          run in this checkout as it is (default)
  --code=revision      HEAD is copied to the folder first, and the working tree must not differ
  --venv=DIR           environment that has python first (the active one, else .venv of this checkout)
  --image=IMAGE        instead: in a container of Docker's, built from launch/docker/gpu.Dockerfile
  --mount=DIR          a folder that the container is to see besides --workdir and --out, repeatable
  --gpus=0,1           only these GPUs
  --max-restarts=N     after crashes (3)
USAGE
}

# `watcher`: the process that supervises the program, while it lives. It holds the lock, and the number
# in the file may be another's after a reboot.
find_watcher() {
  watcher=""
  [[ -f $folder/lock ]] || return 0
  flock --nonblock "$folder/lock" true || watcher=$(<"$folder/watcher")
}

# `words`: what stands before the program, and `code`, where it runs.
find_environment() {
  local venv mount gpus=all
  if [[ -n ${option[image]-} ]]; then
    [[ -n ${option[dry-run]-} ]] || command -v docker >/dev/null || die "there is no docker on this machine"
    values_of mount
    [[ -z ${option[gpus]-} ]] || gpus="\"device=${option[gpus]}\"" # quoted: Docker reads a list of its own
    code=$folder
    words=(docker run --rm --name "$(container_name)" --user "$(id -u):$(id -g)" --env HOME=/tmp
      --network host --ipc host --gpus "$gpus")
    for mount in "$folder" "${outputs[@]}" "${values[@]}"; do
      [[ $mount != *[,\"]* ]] || die "'$mount' cannot be mounted: Docker takes no comma and no quote there"
      words+=(--mount "type=bind,source=$mount,target=$mount")
    done
    words+=("${option[image]}")
    return
  fi
  find_checkout
  words=(env "VIRTUAL_ENV=$venv" "PATH=$venv/bin:$PATH")
  [[ -z ${option[gpus]-} ]] || words+=("CUDA_VISIBLE_DEVICES=${option[gpus]}")
}

# One for each folder, so that it can be found again.
container_name() { echo "dydilit-$(cksum <<<"$folder" | cut -d ' ' -f 1)"; }

start() {
  check_program
  find_folder
  number max-restarts 3 0
  : "${option[code]=here}"
  one_of code here revision
  outputs_of
  local output code words
  for output in "${outputs[@]}"; do check_absolute "--workdir or --out" "$output"; done
  find_environment
  find_watcher
  [[ -z $watcher ]] || die "$folder is in use by process $watcher: see launch/host.sh status, or delete it first"
  run mkdir -p "$folder" "${outputs[@]}"
  copy_code "$code"
  run rm -f "$folder/watcher"
  # shellcheck disable=SC2016 # the inner shell's own arguments
  run setsid --fork flock --nonblock --no-fork "$folder/lock" bash -c \
    'cd "$1" && echo $$ >"$2/watcher" && shift 2 && exec "$@" >>"$0" 2>&1 </dev/null' \
    "$folder/run.log" "$code" "$folder" \
    "$ROOT/launch/supervise.sh" "--max-restarts=${option[max-restarts]}" "--status=$folder/status" -- \
    "${words[@]}" "${program[@]}"
  [[ -z ${option[dry-run]-} ]] || return 0
  local _
  for _ in {1..50}; do
    [[ ! -s $folder/watcher ]] || break
    sleep 0.1
  done
  [[ -s $folder/watcher ]] || die "the program did not start: see $folder/run.log"
  note "log: $folder/run.log"
  cat "$folder/watcher"
}

status() {
  find_folder
  find_watcher
  local code=""
  [[ ! -f $folder/status ]] || code=$(<"$folder/status")
  if [[ -n $watcher ]]; then
    printf 'RUNNING\t%s\n' "$watcher"
  else
    if [[ -n $code ]]; then
      end_word "$code"
    elif [[ -f $folder/run.log ]]; then
      echo LOST
    else
      echo ABSENT
    fi
  fi
}

logs() {
  find_folder
  [[ -f $folder/run.log ]] || die "$folder has no run.log: nothing was started there"
  show_log "$folder/run.log"
}

delete() {
  find_folder
  find_watcher
  [[ -n $watcher ]] || die "nothing runs in $folder"
  if [[ -n ${option[now]-} ]]; then
    # The program is in a session of its own, which its parent's end would not reach.
    run kill -STOP "$watcher"
    run pkill -KILL -P "$watcher"
    run kill -KILL "$watcher"
    docker kill "$(container_name)" >/dev/null 2>&1 || true # if it was in one
    return
  fi
  run kill -TERM "$watcher"
  [[ -z ${option[dry-run]-} ]] || return 0
  note "process $watcher is told to save and end"
  flock "$folder/lock" true
}

command_line "start status logs delete" "folder workdir code venv image mount gpus max-restarts" \
  "dry-run follow now" "$@"
