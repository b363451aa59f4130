#!/usr/bin/env bash
# Runs a program on TPU VMs, requested as queued resources; see launch/tpu.sh --help and docs/launch.md.
# shellcheck source=launch/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=launch/accelerators.sh
. "$ROOT/launch/accelerators.sh"

usage() {
  cat <<'USAGE'
launch/tpu.sh start  --job=NAME --project=P --zone=Z --topology=v5e:16x16 [options]
                     -- python -m dydilit_jax.train --config=... --workdir=gs://BUCKET/runs/xl
launch/tpu.sh keep   the same; stays, asks again after each preemption, deletes the TPU when the run has ended
launch/tpu.sh status --job=NAME --project=P --zone=Z
launch/tpu.sh logs   ... [--slices=N --slice=0] [--host=0] [--follow]
launch/tpu.sh delete ... [--slices=N] [--now]

start requests one slice or several; when Google Cloud has them, each host starts the program by itself, also
after a reboot. A Spot slice that is preempted is gone until someone asks again: keep does, on a machine that
stays on (a login host, a small VM, tmux); ending keep leaves the TPU as it is.

  --dry-run            print, as a shell script, all that would be run; needs no account
  --topology=v5e:16x16 slice, as for python -m dydilit_jax.compile;  --slices=N  how many (1)
  --spot               on Spot VMs;  --reserved  on a reservation; else on demand
  --repository=URL     code goes by git revision: HEAD, which must be pushed, is cloned from here on each host, which
                       has no key of yours (the remote origin, by https)
  --image=IMAGE        instead of that: built from launch/docker/tpu.Dockerfile; has the code
  --nfs=SERVER:/EXPORT:/DIR  file system to mount (Filestore), repeatable;  --shared=/DIR  a folder all hosts have
  --runtime=VERSION    of the TPU VM;  --network=N --subnetwork=N --service-account=EMAIL  as for gcloud
  --internal-ips       hosts without addresses of their own on the internet
  --valid-until=TIME   gives up waiting then, like 6h
  --max-restarts=N     how often the program is started again after crashes (3)
  --poll=SECONDS       how often keep looks (60)

gs://BUCKET/PATH in an argument of the program becomes /gcs/BUCKET/PATH, where Cloud Storage FUSE mounts the
bucket. It must have a hierarchical namespace, because checkpoints are renamed folders.
delete tells the program to save first, unless --now.
USAGE
}

VALUED="job project zone topology slices slice host repository image nfs shared runtime network subnetwork
service-account valid-until max-restarts poll"
BASE=/opt/dydilit # of all that a host holds
ASK="cat $BASE/status 2>/dev/null || echo running"
FAILURES=3        # requests in a row that fail before the slice was there

where() {
  job_name
  required project "the Google Cloud project"
  required zone "the zone that has the TPUs, like us-west4-a"
  place=("--project=${option[project]}" "--zone=${option[zone]}")
  queued=(gcloud compute tpus queued-resources)
}

# node_names: `nodes` are the slices' names.
node_names() {
  local i
  number slices 1 1
  nodes=("${option[job]}")
  ((option[slices] == 1)) || nodes=()
  for ((i = 0; option[slices] > 1 && i < option[slices]; i++)); do nodes+=("${option[job]}-$i"); done
}

# `startup_script`: what each host runs as root when it starts.
make_startup_script() {
  local i nfs shared mark=END_OF_SUPERVISE
  values_of nfs
  nfs=("${values[@]}")
  values_of shared
  shared=("${values[@]}") shared_places=("${values[@]}")
  for ((i = 0; i < ${#nfs[@]}; i++)); do
    [[ ${nfs[i]} =~ ^[A-Za-z0-9.-]+:/[^:]*:/[^:]+$ ]] || die "--nfs=${nfs[i]} has the form SERVER:/EXPORT:/FOLDER"
    shared_places+=("${nfs[i]##*:}")
  done
  mount_buckets
  outputs_of
  check_shared "${outputs[@]}"
  repository="" revision=""
  if [[ -n ${option[image]-} ]]; then
    check_image
  else
    clean_revision "--image"
    pushed_revision
  fi
  startup_script="#!/usr/bin/env bash
# Made by launch/tpu.sh. Run as root on each host, whenever it starts.
base=\${DYDILIT_BASE:-$BASE}
repository=$(quoted "$repository")
revision=$(quoted "$revision")
image=$(quoted "${option[image]-}")
max_restarts=${option[max-restarts]}
buckets=($(quoted "${buckets[@]}"))
nfs=($(quoted "${nfs[@]}"))
shared=($(quoted "${shared[@]}"))
outputs=($(quoted "${outputs[@]}"))
program=($(quoted "${program[@]}"))
mkdir -p \"\$base\"
cat >\"\$base/supervise.sh\" <<'$mark'
$(<"$ROOT/launch/supervise.sh")
$mark
$(<"$ROOT/launch/tpu_vm.sh")"
}

prepare() {
  where
  required topology "the slice, like --topology=v5e:16x16"
  tpu_slice "${option[topology]}"
  [[ -n $queued_type ]] || die "${option[topology]%%:*} is not to be had as a queued resource: use launch/gke.sh"
  cubic_shape "$chips"
  [[ ${option[topology]} != v5p:* || $shape == "$cubic" ]] ||
    die "a queued resource of $chips chips of v5p comes as v5p:$cubic: use that, or launch/gke.sh"
  [[ -z ${option[spot]-} || -z ${option[reserved]-} ]] || die "give either --spot or --reserved"
  number max-restarts 3 0
  number poll 60 0
  check_program
  node_names
  make_startup_script
  if [[ -z ${option[dry-run]-} ]]; then
    command -v gcloud >/dev/null || die "there is no gcloud on this machine: install the Google Cloud CLI, or use --dry-run"
  fi
}

request() {
  local folder=${XDG_STATE_HOME:-$HOME/.local/state}/dydilit-jax file
  file=$folder/${option[job]}-startup.sh
  [[ $file != *,* ]] || die "$file holds a comma, which gcloud takes for its own: set XDG_STATE_HOME to another folder"
  local create=("${queued[@]}" create "${option[job]}" "${place[@]}")
  case ${option[topology]} in
    v4:*) create+=(--type=v4 "--topology=$shape") ;; # the one generation of several shapes that gcloud takes
    *) create+=("--accelerator-type=$queued_type") ;;
  esac
  create+=("--runtime-version=${option[runtime]-$runtime}")
  if ((${#nodes[@]} == 1)); then
    create+=("--node-id=${nodes[0]}")
  else
    create+=("--node-count=${#nodes[@]}" "--node-prefix=${option[job]}")
  fi
  local name
  for name in spot reserved internal-ips; do
    [[ -z ${option[$name]-} ]] || create+=("--$name")
  done
  for name in network subnetwork service-account; do
    [[ -z ${option[$name]-} ]] || create+=("--$name=${option[$name]}")
  done
  [[ -z ${option[valid-until]-} ]] || create+=("--valid-until-duration=${option[valid-until]}")
  create+=("--labels=dydilit-jax-launch=${option[job]}" "--metadata-from-file=startup-script=$file")
  run mkdir -p "$folder"
  run_with_input "$startup_script" dd "of=$file" status=none
  run_aside "${create[@]}"
}

start() {
  prepare
  check_buckets "${buckets[@]}"
  request
  [[ -n ${option[dry-run]-} ]] || echo "${option[job]}"
}

# `state` of the request; NONE without one, empty if it cannot be asked.
find_state() {
  local told
  state=""
  if told=$("${queued[@]}" describe "${option[job]}" "${place[@]}" '--format=value(state.state)' 2>&1); then
    state=${told##*$'\n'}
  elif [[ $told == *NOT_FOUND* || $told == *"not found"* ]]; then
    state=NONE
  else
    note "cannot ask for ${option[job]}: ${told##*$'\n'}"
  fi
}

# on_hosts NODE HOST COMMAND: runs a command on a host (a number, or all) of a slice.
on_hosts() {
  run gcloud compute tpus tpu-vm ssh "$1" "${place[@]}" "--worker=$2" --quiet "--command=$3"
}

remove() { run_aside "${queued[@]}" delete "${option[job]}" "${place[@]}" --force --quiet; }

# `end`: the status that the program has ended with for good; empty before. Hosts need not end together.
find_end() {
  local node told
  # gcloud may say something of its own before.
  end=$(on_hosts "${nodes[0]}" 0 "$ASK" 2>/dev/null | tr -d '\r' | grep -xE '[0-9]+|running' | tail -n 1) || end=""
  [[ $end =~ ^[0-9]+$ && $end != 75 ]] || end=""
  [[ $end == 0 ]] || return 0
  for node in "${nodes[@]}"; do
    told=$(on_hosts "$node" all "$ASK" 2>/dev/null) || told=running
    ! grep -qx $'running\r\\?' <<<"$told" || end=""
  done
}

# After the last attempt: deletes what costs money, and ends with the program's status.
ended() {
  note "the run has ended with status $1; its logs are in WORKDIR/launch"
  remove
  exit "$1"
}

keep() {
  prepare
  check_buckets "${buckets[@]}"
  if [[ -n ${option[dry-run]-} ]]; then
    request
    echo "# then, every ${option[poll]} s until the run has ended; SUSPENDED or FAILED: delete, and the same request"
    run "${queued[@]}" describe "${option[job]}" "${place[@]}" '--format=value(state.state)'
    on_hosts "${nodes[0]}" 0 "$ASK"
    return
  fi
  local seen="" failures=0 state_before=""
  while :; do
    find_state
    [[ $state == "$state_before" ]] || note "$(date -u +%Y-%m-%dT%H:%M:%SZ) ${option[job]}: ${state:-unknown}"
    state_before=$state
    case $state in
      NONE)
        if [[ -n $seen ]]; then
          note "${option[job]} was deleted by someone else, and is not asked for again"
          return
        fi
        request
        seen=yes
        ;;
      SUSPENDED | FAILED)
        [[ $state == SUSPENDED ]] || failures=$((failures + 1))
        ((failures < FAILURES)) ||
          die "the request for ${option[job]} failed $FAILURES times: see $(quoted "${queued[@]}" describe "${option[job]}" "${place[@]}")"
        remove
        request
        seen=yes
        ;;
      ACTIVE)
        seen=yes failures=0
        find_end
        [[ -z $end ]] || ended "$end"
        ;;
      *) [[ -z $state ]] || seen=yes ;;
    esac
    sleep "${option[poll]}"
  done
}

status() {
  where
  if [[ -n ${option[dry-run]-} ]]; then
    run "${queued[@]}" describe "${option[job]}" "${place[@]}" '--format=value(state.state)'
    return
  fi
  find_state
  printf '%s\t%s\n' "${option[job]}" "${state:-UNKNOWN}"
}

logs() {
  where
  node_names
  number slice 0 0
  number host 0 0
  [[ -n ${nodes[${option[slice]}]-} ]] || die "--slice=${option[slice]}: there are ${#nodes[@]} slices, counted from 0; give --slices=N"
  local how="cat"
  [[ -z ${option[follow]-} ]] || how="tail -n +1 -F"
  on_hosts "${nodes[${option[slice]}]}" "${option[host]}" "sudo $how $BASE/startup.log $BASE/run.log"
}

delete() {
  where
  node_names
  local node
  if [[ -z ${option[now]-} ]]; then
    for node in "${nodes[@]}"; do
      # Returns when the program has saved and ended.
      on_hosts "$node" all "sudo systemctl stop dydilit" ||
        note "warning: $node could not be told to save; it is deleted all the same"
    done
  fi
  remove
}

command_line "start keep status logs delete" "$VALUED" "dry-run follow now spot reserved internal-ips" "$@"
