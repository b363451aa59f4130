#!/usr/bin/env bash
# Runs a program on hosts of a Slurm cluster; see launch/slurm.sh --help and docs/launch.md.
# shellcheck source=launch/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'USAGE'
launch/slurm.sh start  --job=NAME [options] -- python -m dydilit_jax.train --config=... --workdir=/shared/...
launch/slurm.sh start  --job=NAME --array=FILE --folder=DIR [--max-parallel=N] [options]
launch/slurm.sh status --job=NAME [--folder=DIR | --workdir=DIR]
launch/slurm.sh logs   --job=NAME (--folder=DIR | --workdir=DIR) [--task=K] [--follow]
launch/slurm.sh delete --job=NAME [--task=K] [--now]

start submits a batch job: one task on each host, which takes all GPUs of the host. It prints the job's
number. A job that is preempted, loses a host or comes to its time limit is queued again, and goes on from
its last checkpoint. With --array every line of FILE is a command, and a job of its own; the line has
shell words, of which nothing is expanded.

  --dry-run            print, as a shell script, all that would be run
  --nodes=N            hosts (1)
  --gpus-per-node=N    GPUs of each host (0)
  --cpus-per-task=N    CPUs of each host; without it the job takes whole hosts, with all their memory
  --mem=SIZE --partition=P --account=A --qos=Q --constraint=F --time=T   as for sbatch
  --sbatch-option=OPT  any other option of sbatch, as one word; may be repeated
  --grace=SECONDS      at the time limit: how long before it the run is told to save (120)
  --max-restarts=N     how often a run that crashed is tried again (3); preemptions are not counted
  --folder=DIR         where the job's code, logs and exit statuses are, visible to all hosts (WORKDIR/launch)
  --code=revision      HEAD is copied to the folder, and the working tree must not differ (default)
  --code=here          run in this checkout as it is, which all hosts must see
  --venv=DIR           environment that has python first (the active one, else .venv of this checkout)
  --container=pyxis|apptainer --image=IMAGE   run in a container, with the code that is in it
  --mount=DIR          a folder that the container is to see besides --folder, --workdir and --out; repeatable
  --code-in-image=DIR  where the code is in it (/opt/dydilit_jax)

status prints a line for each job or task: number, state, restarts, hosts or reason; tab-separated. delete
tells a running job to save and end; with --now it does not wait for that.
USAGE
}

VALUED="job nodes gpus-per-node cpus-per-task mem partition account qos constraint time sbatch-option grace
max-restarts folder workdir code venv container image mount code-in-image array max-parallel task"

# `code` and `environment`: options of the batch script that say where the code is and what runs it.
find_code() {
  : "${option[code]=revision}"
  one_of code revision here
  environment=()
  if [[ -n ${option[container]-}${option[image]-} ]]; then
    required container "pyxis or apptainer, whichever the cluster has"
    one_of container pyxis apptainer
    required image "an image file, or a name like docker://registry/image:tag"
    code=${option[code-in-image]-/opt/dydilit_jax}
    environment=("--container=${option[container]}" "--image=${option[image]}")
    local mount
    values_of mount
    for mount in "${values[@]}"; do environment+=("--mount=$mount"); done
    for mount in "$folder" "${outputs[@]}" "${values[@]}"; do
      [[ $mount != *[,:]* ]] || die "'$mount' cannot be mounted: a container's mounts take no comma or colon"
    done
    return
  fi
  local venv
  find_checkout
  environment=("--venv=$venv")
}

start() {
  job_name
  number nodes 1 1
  number gpus-per-node 0 0
  number grace 120 0
  number max-restarts 3 0
  if [[ -n ${option[array]-} ]]; then
    required folder "where the array's code and logs are, visible to all hosts"
    check_array
  else
    [[ -z ${option[max-parallel]-} ]] || die "--max-parallel is for --array"
    commands=("")
    check_program
  fi
  find_folder
  [[ $folder != *\\* ]] || die "--folder=$folder holds a backslash, which Slurm takes for its own"
  # The programs' own folders; and each command with what the launcher gives it.
  local line all_outputs=() texts=""
  for line in "${commands[@]}"; do
    if [[ -n $line ]]; then
      words_of "$line"
      check_program
      texts+=$(quoted "${program[@]}")$'\n'
    fi
    outputs_of
    local output
    for output in "${outputs[@]}"; do
      check_absolute "--workdir or --out" "$output"
      all_outputs+=("$output")
    done
  done
  outputs=("${all_outputs[@]}")
  find_code

  local submit=(sbatch --parsable "--job-name=${option[job]}" "--nodes=${option[nodes]}"
    --ntasks-per-node=1 --requeue --open-mode=append "--signal=TERM@${option[grace]}")
  ((${option[gpus-per-node]} == 0)) || submit+=("--gpus-per-node=${option[gpus-per-node]}")
  if [[ -n ${option[cpus-per-task]-} ]]; then
    number cpus-per-task 1 1
    submit+=("--cpus-per-task=${option[cpus-per-task]}")
  else
    submit+=(--exclusive)
    : "${option[mem]=0}" # all there is
  fi
  local name log=%j
  for name in mem partition account qos constraint time; do
    [[ -z ${option[$name]-} ]] || submit+=("--$name=${option[$name]}")
  done
  if [[ -n ${option[array]-} ]]; then
    log=%A_%a
    name=0-$((${#commands[@]} - 1))
    if [[ -n ${option[max-parallel]-} ]]; then
      number max-parallel 1 1
      name+=%${option[max-parallel]}
    fi
    submit+=("--array=$name")
  fi
  submit+=("--output=${folder//%/%%}/logs/$log.out")
  values_of sbatch-option
  submit+=("${values[@]}" "$ROOT/launch/slurm_job.sh" "--folder=$folder" "--code=$code"
    "--max-restarts=${option[max-restarts]}" "${environment[@]}")

  [[ -n ${option[dry-run]-} ]] || command -v sbatch >/dev/null ||
    die "there is no sbatch: run this on a login node of the cluster"
  run mkdir -p "$folder/logs" "$folder/exit"
  copy_code "$code"
  if [[ -n ${option[array]-} ]]; then
    local list
    list=$folder/${option[job]}.$(cksum <<<"$texts" | tr ' ' '-').commands
    run_with_input "${texts%$'\n'}" dd "of=$list.new" status=none
    run mv "$list.new" "$list"
    submit+=("--commands=$list")
  else
    submit+=(-- "${program[@]}")
  fi
  if [[ -n ${option[dry-run]-} ]]; then
    run "${submit[@]}"
    return
  fi
  local number
  number=$("${submit[@]}")
  number=${number%%;*} # of a federation: JOB;CLUSTER
  printf '%s\t%s\t%s\n' "$number" "${option[job]}" "$(date -u +%Y-%m-%dT%H:%M:%SZ)" >>"$folder/jobs"
  note "log: $folder/logs/$number${option[array]+_K}.out"
  echo "$number"
}

# Jobs and tasks of this name that Slurm has in its queue: number, state, restarts, hosts or reason.
queued_jobs() {
  local ask=(squeue --me "--name=${option[job]}" --array --noheader --states=all
    '--Format=JobArrayID:.64,State:.32,RestartCnt:.16,ReasonList:.512')
  if [[ -n ${option[dry-run]-} ]]; then
    run "${ask[@]}"
    return
  fi
  "${ask[@]}" |
    awk '{ place = $4; for (i = 5; i <= NF; i++) place = place " " $i; print $1 "\t" $2 "\t" $3 "\t" place }'
}

# What a task has ended with says its own record; Slurm forgets it some minutes after the end.
status() {
  job_name
  local jobs number state restarts place file job name
  jobs=$(queued_jobs)
  if [[ -z ${option[folder]-}${option[workdir]-} || -n ${option[dry-run]-} ]]; then
    [[ -z $jobs ]] || echo "$jobs"
    return
  fi
  find_folder
  [[ -f $folder/jobs ]] || return 0
  while IFS=$'\t' read -r job name _; do
    [[ $name == "${option[job]}" ]] || continue
    local -A restarts_of=()
    while IFS=$'\t' read -r number state restarts place; do
      [[ $number == "$job" || $number == "${job}_"* ]] || continue
      restarts_of[$number]=$restarts
      [[ -f $folder/exit/$number ]] || printf '%s\t%s\t%s\t%s\n' "$number" "$state" "$restarts" "$place"
    done <<<"$jobs"
    for file in "$folder/exit/$job" "$folder/exit/$job"_*; do
      [[ -f $file && ${file##*/} != *.* ]] || continue
      number=${file##*/}
      state=$(end_word "$(<"$file")")
      printf '%s\t%s\t%s\t\n' "$number" "$state" "${restarts_of[$number]-}"
    done
  done <"$folder/jobs"
}

logs() {
  job_name
  find_folder
  local number file
  [[ -f $folder/jobs ]] || die "$folder has no jobs: was the job started with this --folder or --workdir?"
  number=$(awk -F'\t' -v name="${option[job]}" '$2 == name { last = $1 } END { print last }' "$folder/jobs")
  [[ -n $number ]] || die "no job ${option[job]} was started with $folder"
  file=$folder/logs/$number${option[task]+_${option[task]}}.out
  [[ -f $file ]] || die "$file is not there: the job has not started yet, or is an array, of which --task=K is one"
  show_log "$file"
}

delete() {
  job_name
  local number state found="" name=${option[job]}
  if [[ -n ${option[dry-run]-} ]]; then
    run scancel "--name=${option[job]}" --me --state=PENDING
    echo "# and for each JOB of this name that runs:"
    run scontrol update "JobId=JOB" Requeue=0
    run scancel --signal=TERM "JOB"
    return
  fi
  while IFS=$'\t' read -r number state _; do
    [[ -z ${option[task]-} || $number == *_"${option[task]}" ]] || continue
    case $state in
      RUNNING | SUSPENDED | CONFIGURING | PENDING | REQUEUED) ;;
      *) continue ;;
    esac
    found=yes
    if [[ $state == RUNNING && -z ${option[now]-} ]]; then
      # Its step is told to save. Then the batch script sees that it is not to be queued again.
      run scontrol update "JobId=$number" Requeue=0
      run scancel --signal=TERM "$number"
      note "job $number is told to save and end"
    else
      run scancel "$number"
      note "job $number is cancelled"
    fi
  done < <(queued_jobs)
  [[ -n $found ]] || die "no job of yours named $name${option[task]+, task ${option[task]},} is in the queue"
}

command_line "start status logs delete" "$VALUED" "dry-run follow now" "$@"
