# shellcheck shell=bash disable=SC2154 # the variables above are set by launch/tpu.sh
# What a host of a TPU slice does when it starts; launch/tpu.sh puts variables and supervise.sh before it.
set -euo pipefail
exec >>"$base/startup.log" 2>&1
echo "--- $(date -u +%Y-%m-%dT%H:%M:%SZ) $(hostname) starts"
# A run that has finished, or that a user's mistake ended, is not begun again by a reboot.
case $(cat "$base/status" 2>/dev/null || true) in 0 | 2) exit 0 ;; esac

retry() { # The network of a host that has just started may need a moment.
  local i
  for i in 1 2 3 4 5; do
    "$@" && return
    echo "failed: $1; try $i of 5"
    sleep $((5 * i))
  done
  return 1
}

GCSFUSE=3.8.0
install_gcsfuse() {
  local package=gcsfuse_${GCSFUSE}_amd64.deb
  curl --fail --silent --location --output "/tmp/$package" \
    "https://github.com/GoogleCloudPlatform/gcsfuse/releases/download/v$GCSFUSE/$package"
  apt-get install -qq --yes "/tmp/$package"
}

for bucket in "${buckets[@]}"; do
  command -v gcsfuse >/dev/null || retry install_gcsfuse
  mkdir -p "/gcs/$bucket"
  mountpoint -q "/gcs/$bucket" || retry gcsfuse --implicit-dirs -o allow_other "$bucket" "/gcs/$bucket"
done
for each in "${nfs[@]}"; do
  command -v mount.nfs >/dev/null || retry apt-get install -qq --yes nfs-common
  mkdir -p "${each##*:}"
  mountpoint -q "${each##*:}" || retry mount -t nfs -o hard "${each%:*}" "${each##*:}"
done

if [[ -n $image ]]; then
  [[ $image != *.pkg.dev/* && $image != *gcr.io/* ]] || retry gcloud auth configure-docker "${image%%/*}" --quiet
  retry docker pull --quiet "$image"
  volumes=()
  for place in "${buckets[@]/#//gcs/}" "${nfs[@]##*:}" "${shared[@]}"; do volumes+=(--volume "$place:$place"); done
  docker rm --force dydilit >/dev/null 2>&1 || true
  program=(docker run --rm --name dydilit --privileged --network host --ipc host "${volumes[@]}" "$image"
    "${program[@]}")
  directory=$base
else
  directory=$base/code
  if [[ ! -e $base/installed ]]; then
    git init -q "$directory"
    retry git -C "$directory" fetch -q --depth=1 "$repository" "$revision"
    git -C "$directory" checkout -q --force FETCH_HEAD
    # The system's Python may be older than the oldest that is supported.
    python3 -m pip --version >/dev/null 2>&1 || retry apt-get install -qq --yes python3-pip
    retry python3 -m pip install --quiet --target="$base/uv" uv
    retry "$base/uv/bin/uv" venv --quiet --clear --python=3.12 "$base/venv"
    retry "$base/uv/bin/uv" pip install --quiet --python="$base/venv/bin/python" \
      --requirement="$directory/requirements.txt" 'jax[tpu]'
    touch "$base/installed"
  fi
  export PATH=$base/venv/bin:$PATH VIRTUAL_ENV=$base/venv
fi

# What systemd runs, so that it need not quote anything.
{
  echo '#!/usr/bin/env bash'
  printf 'export PATH=%q\ncd %q\nexec bash %q' "$PATH" "$directory" "$base/supervise.sh"
  printf ' %q' --max-restarts="$max_restarts" --pause=15 --status="$base/status" -- "${program[@]}"
  echo
} >"$base/run.sh"
# The host and its log go; the log is kept where the run writes.
{
  echo '#!/usr/bin/env bash'
  [[ -z ${outputs[0]-} ]] || printf 'mkdir -p %q && cp %q %q\n' "${outputs[0]}/launch" "$base/run.log" \
    "${outputs[0]}/launch/$(hostname).log"
} >"$base/keep_log.sh"
chmod +x "$base/run.sh" "$base/keep_log.sh"

# SIGTERM goes to supervise.sh alone, which passes it on once: a second one would end the run unsaved.
systemctl reset-failed dydilit 2>/dev/null || true
systemd-run --unit=dydilit --property=KillMode=mixed --property=TimeoutStopSec=300 \
  --property="StandardOutput=append:$base/run.log" --property="StandardError=append:$base/run.log" \
  --property="ExecStopPost=$base/keep_log.sh" "$base/run.sh"
