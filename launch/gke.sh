#!/usr/bin/env bash
# Runs a program on TPU slices or GPU hosts of a GKE cluster; see launch/gke.sh --help and docs/launch.md.
# shellcheck source=launch/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=launch/accelerators.sh
. "$ROOT/launch/accelerators.sh"

usage() {
  cat <<'USAGE'
launch/gke.sh start    --job=NAME --project=P --cluster=C --location=L --image=IMAGE (--topology=T | --gpu=G) [options]
                       -- python -m dydilit_jax.train --config=... --workdir=gs://BUCKET/runs/xl
launch/gke.sh manifest the same; prints the JobSet's manifest and does nothing
launch/gke.sh status   --job=NAME --project=P --cluster=C --location=L
launch/gke.sh logs     ... [--task=K] [--host=0] [--follow]
launch/gke.sh delete   ... [--task=K]

start creates a JobSet (its controller must be on the cluster, 0.6 or newer), with a pod on each host of
each slice. When a pod fails, is preempted or evicted, all pods start again together and go on from the last
checkpoint; a user's mistake (status 2) ends the JobSet. Prints the JobSet's name.

  --dry-run            print, as a shell script, all that would be run; needs no account
  --location=L         zone or region of the cluster
  --image=IMAGE        built from launch/docker/tpu.Dockerfile or gpu.Dockerfile; has the code
  --topology=v5e:16x16 TPU slice, as for python -m dydilit_jax.compile;  --slices=N  how many (1)
  --gpu=nvidia-h100-80gb --gpus-per-node=N (8) --nodes=N (1)
  --spot               on Spot VMs
  --queue=NAME         local queue of Kueue, which then decides when it runs;  --priority=CLASS  its priority
  --namespace=N        (default);  --service-account=KSA  of Kubernetes, with access to the buckets
  --volume=CLAIM:/DIR  a PersistentVolumeClaim to mount, repeatable;  --shared=/DIR  a folder all hosts have
  --memory=SIZE        what a pod asks for, where the node pool does not decide
  --max-restarts=N     of all pods, for whatever reason (100)
  --grace=SECONDS      between SIGTERM and SIGKILL (120; Spot VMs leave less)
  --array=FILE         a JobSet NAME-K for each line of FILE, a command in shell words

gs://BUCKET/PATH in an argument of the program becomes /gcs/BUCKET/PATH, where Cloud Storage FUSE mounts the
bucket. It must have a hierarchical namespace, because checkpoints are renamed folders.
USAGE
}

VALUED="job project cluster location image topology slices gpu gpus-per-node nodes queue priority namespace
service-account volume shared memory max-restarts grace array task host"
PORT=8476

where() {
  job_name
  required project "the Google Cloud project"
  required cluster "the GKE cluster"
  required location "the cluster's zone or region"
}

# `kubectl`: the command that speaks to the cluster.
connect() {
  local namespace=${option[namespace]-default}
  kubectl=(kubectl "--context=gke_${option[project]}_${option[location]}_${option[cluster]}"
    "--namespace=$namespace")
  local tool
  for tool in gcloud kubectl; do
    [[ -n ${option[dry-run]-} ]] || command -v "$tool" >/dev/null ||
      die "there is no $tool on this machine: install the Google Cloud CLI with kubectl, or use --dry-run"
  done
  run_aside gcloud container clusters get-credentials "${option[cluster]}" \
    "--location=${option[location]}" "--project=${option[project]}"
}

# The pod's volumes: `mounts` and `volumes` are their YAML, each line with 16 spaces and 12.
pod_volumes() {
  local i=0 bucket each claim path
  # JAX's hosts and processes of a data loader exchange batches through shared memory.
  mounts="
                - {name: shared-memory, mountPath: /dev/shm}"
  volumes="
            - name: shared-memory
              emptyDir: {medium: Memory}"
  for bucket in "${buckets[@]}"; do
    mounts+="
                - {name: bucket-$i, mountPath: $(yaml_string "/gcs/$bucket")}"
    volumes+="
            - name: bucket-$i
              csi:
                driver: gcsfuse.csi.storage.gke.io
                volumeAttributes: {bucketName: $(yaml_string "$bucket"), mountOptions: implicit-dirs}"
    i=$((i + 1))
  done
  for each in "${claims[@]}"; do
    claim=${each%%:*} path=${each#*:}
    mounts+="
                - {name: claim-$i, mountPath: $(yaml_string "$path")}"
    volumes+="
            - name: claim-$i
              persistentVolumeClaim: {claimName: $(yaml_string "$claim")}"
    i=$((i + 1))
  done
}

# Kubernetes reads $(NAME) in an argument, and $$ as a dollar sign.
container_argument() { yaml_string "${1//\$/\$\$}"; }

# manifest_of NAME: the JobSet that runs `program`.
manifest_of() {
  local name=$1 word arguments="" selector resources annotations="" labels="" pod_annotations="" extra="" tolerations=""
  local replicas pods key value
  if [[ -n ${option[topology]-} ]]; then
    replicas=${option[slices]} pods=$hosts
    key=google.com/tpu value=$chips_per_host
    selector="cloud.google.com/gke-tpu-accelerator: $tpu_label
              cloud.google.com/gke-tpu-topology: $shape"
    # Each slice of several hosts is a node pool of its own.
    ((hosts == 1)) || annotations="
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool"
  else
    replicas=1 pods=${option[nodes]}
    key=nvidia.com/gpu value=${option[gpus-per-node]}
    selector="cloud.google.com/gke-accelerator: ${option[gpu]}"
  fi
  if [[ -n ${option[spot]-} ]]; then
    selector+="
              cloud.google.com/gke-spot: \"true\""
    tolerations="
            - {key: cloud.google.com/gke-spot, operator: Exists, effect: NoSchedule}"
  fi
  resources="{$key: $value}"
  local requests=$resources
  [[ -z ${option[memory]-} ]] || requests="{$key: $value, memory: $(yaml_string "${option[memory]}")}"
  labels="dydilit-jax/launch: ${option[job]}"
  [[ -z ${option[queue]-} ]] || labels+="
    kueue.x-k8s.io/queue-name: $(yaml_string "${option[queue]}")"
  [[ -z ${option[priority]-} ]] || labels+="
    kueue.x-k8s.io/priority-class: $(yaml_string "${option[priority]}")"
  ((!${#buckets[@]})) || pod_annotations="
              gke-gcsfuse/volumes: \"true\""
  [[ -z ${option[service-account]-} ]] || extra+="
            serviceAccountName: $(yaml_string "${option[service-account]}")"
  for word in "${program[@]}"; do
    arguments+="
              - $(container_argument "$word")"
  done
  # GKE tells the pods of TPUs of each other, but not those of GPUs.
  if [[ -z ${option[topology]-} && $connects == yes ]] && ((pods > 1)); then
    arguments+="
              - \"--coordinator_address=$name-hosts-0-0.$name:$PORT\"
              - \"--num_processes=$pods\"
              - \"--process_id=\$(JOB_COMPLETION_INDEX)\""
  fi
  local mounts volumes
  pod_volumes
  cat <<MANIFEST
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  labels:
    $labels$annotations
spec:
  failurePolicy:
    maxRestarts: ${option[max-restarts]}
    rules:
    # A user's mistake, which starting again would not mend; see podFailurePolicy.
    - name: mistake
      action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: hosts
    replicas: $replicas
    template:
      spec:
        parallelism: $pods
        completions: $pods
        completionMode: Indexed
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes: {containerName: main, operator: In, values: [2]}
        template:
          metadata:
            annotations:$pod_annotations
              kubectl.kubernetes.io/default-container: main
            labels:
              dydilit-jax/launch: ${option[job]}
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: ${option[grace]}$extra
            nodeSelector:
              $selector
            tolerations:
            - {key: $key, operator: Exists, effect: NoSchedule}$tolerations
            containers:
            - name: main
              image: $(yaml_string "${option[image]}")
              # The image's entry point passes signals on.
              args:$arguments
              ports:
              - {containerPort: $PORT}
              - {containerPort: 8471}
              resources:
                requests: $requests
                limits: $resources
              volumeMounts:$mounts
            volumes:$volumes
MANIFEST
}

# `manifests`: of all JobSets; `names`: theirs; `all_buckets`: that they use.
prepare() {
  where
  required image "built from launch/docker and pushed; it has the code"
  check_image
  number slices 1 1
  number gpus-per-node 8 1
  number nodes 1 1
  number max-restarts 100 0
  number grace 120 1
  if [[ -n ${option[topology]-} ]]; then
    [[ -z ${option[gpu]-} ]] || die "give either --topology (TPUs) or --gpu"
    tpu_slice "${option[topology]}"
  else
    [[ -n ${option[gpu]-} ]] || die "--topology or --gpu is missing: which accelerator, like --topology=v5e:4x4 or --gpu=nvidia-h100-80gb"
    ((option[slices] == 1)) || die "--slices is for TPUs: GPU hosts are counted by --nodes"
    gpu_name "${option[gpu]}"
  fi
  values_of volume
  claims=("${values[@]}")
  values_of shared
  shared_places=("${values[@]}")
  local each
  for each in "${claims[@]}"; do
    [[ $each =~ ^[a-z0-9][a-z0-9.-]*:/.+ ]] || die "--volume=$each has the form CLAIM:/FOLDER"
    shared_places+=("${each#*:}")
  done
  local lines=("") k=0 name line
  if [[ -n ${option[array]-} ]]; then
    check_array
    lines=("${commands[@]}")
  fi
  manifests="" names=() all_buckets=()
  for line in "${lines[@]}"; do
    name=${option[job]}
    if [[ -n $line ]]; then
      words_of "$line"
      name+=-$k
      k=$((k + 1))
      manifests+=${manifests:+$'\n---\n'}
    fi
    check_program
    buckets=()
    mount_buckets
    outputs_of
    check_shared "${outputs[@]}"
    names+=("$name")
    for each in "${buckets[@]}"; do
      [[ " ${all_buckets[*]-} " == *" $each "* ]] || all_buckets+=("$each")
    done
    manifests+=$(manifest_of "$name")
  done
}

manifest() {
  prepare
  echo "$manifests"
}

start() {
  prepare
  connect
  check_buckets "${all_buckets[@]}"
  run_with_input "$manifests" "${kubectl[@]}" create -f -
  [[ -n ${option[dry-run]-} ]] || printf '%s\n' "${names[@]}"
}

task_name() { echo "${option[job]}${option[task]+-${option[task]}}"; }

status() {
  where
  connect
  run "${kubectl[@]}" get jobsets.jobset.x-k8s.io "--selector=dydilit-jax/launch=${option[job]}" \
    "--output=jsonpath={range .items[*]}{.metadata.name}{\"\t\"}{.status.terminalState}{\"\t\"}{.status.restarts}{\"\t\"}{range .status.replicatedJobsStatus[*]}{.ready} ready, {.succeeded} succeeded, {.failed} failed{end}{\"\n\"}{end}" |
    awk -F'\t' -v OFS='\t' -v dry="${option[dry-run]-}" 'dry { print; next } NF { state = toupper($2)
      if (state == "COMPLETED") state = "FINISHED"; if (state == "") state = "ACTIVE"
      print $1, state, $3 + 0, $4 }'
}

logs() {
  where
  number host 0 0
  connect
  local selector
  selector="jobset.sigs.k8s.io/jobset-name=$(task_name),jobset.sigs.k8s.io/job-index=0"
  run "${kubectl[@]}" logs "--selector=$selector,batch.kubernetes.io/job-completion-index=${option[host]}" \
    --container=main --tail=-1 ${option[follow]+--follow}
}

delete() {
  where
  connect
  # SIGTERM to every pod, and the time of --grace to save.
  if [[ -n ${option[task]-} ]]; then
    run "${kubectl[@]}" delete jobsets.jobset.x-k8s.io "$(task_name)"
  else
    run "${kubectl[@]}" delete jobsets.jobset.x-k8s.io "--selector=dydilit-jax/launch=${option[job]}"
  fi
}

command_line "start manifest status logs delete" "$VALUED" "dry-run follow spot" "$@"
