#!/usr/bin/env bash
# shellcheck disable=SC2034 # what functions find, others read
# What the launch scripts share: options, errors in one line, quoting, and checks of what is to run.
# Sourced, not run. Functions that find something leave it in a variable named in their comment: an
# error within $(...) would end only the subshell.

set -euo pipefail

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "error: bash 4.4 or newer is needed, this is $BASH_VERSION" >&2
  exit 2
fi

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
STOPPED_STATUS=75 # of a run that was asked to stop before its end; EX_TEMPFAIL of sysexits.h
MEETING_SECONDS=1800 # hosts of one run may come as much later than the first

declare -A option=()
declare -a program=()
shared_places=() # folders that all hosts see
buckets=()
connects=no # whether the program is an entry point that connects its processes

# A user's mistake: one line, status 2.
die() {
  printf 'error: %s\n' "${*//$'\n'/ }" >&2
  exit 2
}

note() { printf '%s\n' "$*" >&2; }

# The arguments as words that a shell reads back unchanged, readable where they need no quotes.
quoted() {
  local word words=() single="'\\''"
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'${word//\'/"$single"}'"
    words+=("$word")
  done
  local IFS=' '
  printf '%s' "${words[*]}"
}

# Text as a double-quoted YAML string; for text without line separators of Unicode a JSON string too.
yaml_string() {
  local text=$1 number character
  text=${text//\\/\\\\}
  text=${text//\"/\\\"}
  if [[ $text == *[[:cntrl:]]* ]]; then
    for number in {1..31} 127; do
      printf -v character '%b' "\\x$(printf %x "$number")"
      text=${text//"$character"/$(printf '\\u%04x' "$number")}
    done
  fi
  # YAML 1.1 folds lines at these.
  text=${text//$'\xc2\x85'/\\N}
  text=${text//$'\xe2\x80\xa8'/\\L}
  text=${text//$'\xe2\x80\xa9'/\\P}
  printf '"%s"' "$text"
}

# Runs a command; with --dry-run prints it, so that the output is a shell script of all that would run.
run() {
  if [[ -n ${option[dry-run]-} ]]; then
    quoted "$@"
    echo
  else
    "$@"
  fi
}

# The same for a command whose output is not what the caller of the script wants: it goes to stderr.
run_aside() {
  if [[ -n ${option[dry-run]-} ]]; then
    run "$@"
  else
    "$@" >&2
  fi
}

# run_with_input TEXT COMMAND...: the same with TEXT and a line's end on standard input.
run_with_input() {
  local text=$1 mark=END_OF_INPUT
  shift
  if [[ -n ${option[dry-run]-} ]]; then
    while [[ $'\n'$text$'\n' == *$'\n'"$mark"$'\n'* ]]; do mark+=_; done
    printf "%s <<'%s'\n%s\n%s\n" "$(quoted "$@")" "$mark" "$text" "$mark"
  else
    "$@" <<<"$text" >&2
  fi
}

# parse_options "NAMES WITH VALUE" "NAMES WITHOUT" ARGUMENT...: fills `option`, where a name that is
# given again adds a line, and `program` with what follows `--`.
parse_options() {
  local valued=" $1 " plain=" $2 " argument name value known
  shift 2
  while (($#)); do
    argument=$1
    shift
    case $argument in
      --)
        program=("$@")
        return
        ;;
      --help | -h)
        usage
        exit 0
        ;;
      --?*) ;;
      *) die "unexpected argument '$argument': options have the form --name=value, the program to run stands behind --" ;;
    esac
    name=${argument%%=*}
    name=${name#--}
    if [[ $plain == *" $name "* ]]; then
      [[ $argument != *=* ]] || die "--$name takes no value"
      option[$name]=yes
    elif [[ $valued == *" $name "* ]]; then
      if [[ $argument == *=* ]]; then
        value=${argument#*=}
      else
        (($#)) || die "--$name needs a value"
        value=$1
        shift
      fi
      [[ -n $value ]] || die "--$name is empty"
      [[ $value != *$'\n'* ]] || die "--$name holds a line break"
      option[$name]=${option[$name]+${option[$name]}$'\n'}$value
    else
      read -ra known <<<"$valued $plain"
      die "unknown option --$name. Known:$(printf ' --%s' "${known[@]}")"
    fi
  done
}

# command_line "COMMANDS" "NAMES WITH VALUE" "NAMES WITHOUT" ARGUMENT...: what every launch script does:
# reads its arguments and runs the function that the first one, a command, names.
command_line() {
  local choices=" $1 " valued=${2//$'\n'/ } plain=$3 command=${4-} script=launch/${0##*/}
  shift 3
  (($#)) && shift
  case $command in
    "" | --help | -h | help)
      usage
      exit 0
      ;;
  esac
  [[ $command =~ ^[a-z]+$ && $choices == *" $command "* ]] ||
    die "unknown command '$command'. Known:${choices% }; see $script --help"
  parse_options "$valued" "$plain" "$@"
  "$command"
}

# required NAME WHAT: the option must be given, once.
required() {
  [[ -n ${option[$1]-} ]] || die "--$1 is missing: $2"
  [[ ${option[$1]} != *$'\n'* ]] || die "--$1 is given twice"
}

# number NAME DEFAULT LEAST: the option is a whole number.
number() {
  local value=${option[$1]-$2}
  if [[ ! $value =~ ^[0-9]{1,9}$ ]] || ((10#$value < $3)); then
    die "--$1=$value must be a whole number, at least $3"
  fi
  option[$1]=$((10#$value))
}

# one_of NAME CHOICE...: the option is one of these.
one_of() {
  local name=$1 choice
  shift
  for choice; do [[ ${option[$name]} != "$choice" ]] || return 0; done
  die "--$name=${option[$name]} is unknown. Known: $(quoted "$@")"
}

# values_of NAME: `values` of an option that may be given again.
values_of() {
  values=()
  [[ -z ${option[$1]-} ]] || mapfile -t values <<<"${option[$1]}"
}

job_name() {
  required job "a name for this run, like --job=xl"
  [[ ${option[job]} =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    die "--job=${option[job]} must be lower-case letters, digits and hyphens, start with a letter, end with a letter or digit, and have at most 40 of them"
}

# ---- The program that is to run

# flag_of NAME: `flag` is the value of the program's flag --NAME, the last one as absl reads it;
# empty without one.
flag_of() {
  local i argument
  flag=""
  for ((i = 0; i < ${#program[@]}; i++)); do
    argument=${program[i]#-}
    argument=${argument#-}
    if [[ ${program[i]} == -* && $argument == "$1="* ]]; then
      flag=${argument#*=}
    elif [[ ${program[i]} == -* && $argument == "$1" ]]; then
      flag=${program[i + 1]-}
    fi
  done
}

# check_program: something is to run, and what looks like an entry point is one. Gives entry points what a
# launched run needs.
check_program() {
  ((${#program[@]})) ||
    die "nothing to run: end with -- python -m dydilit_jax.train --config=... --workdir=..."
  connects=no
  local entry known
  if [[ ${program[0]##*/} == python* && ${program[1]-} == -m && ${program[2]-} == dydilit_jax.* ]]; then
    entry=${program[2]#dydilit_jax.}
    known=$(cd "$ROOT/dydilit_jax" && grep -l '^    cli\.run(' ./*.py | sed 's|^\./||; s|\.py$||' | tr '\n' ' ')
    [[ " $known" == *" $entry "* ]] || die "dydilit_jax.$entry is no entry point. Known: $known"
    if [[ $entry == train ]]; then
      flag_of workdir
      [[ -n $flag ]] || die "train needs --workdir=FOLDER, on storage that outlives the machine"
      flag_of stopped_status
      [[ -n $flag ]] || program+=("--stopped_status=$STOPPED_STATUS")
    fi
    if grep -q '^_CONNECT\b' "$ROOT/dydilit_jax/$entry.py"; then
      connects=yes
      flag_of distributed_timeout
      [[ -n $flag ]] || program+=("--distributed_timeout=$MEETING_SECONDS")
    fi
  fi
}

# outputs_of: `outputs` are the folders the program writes to: --workdir and --out, which may name a file.
outputs_of() {
  local name
  outputs=()
  for name in workdir out; do
    flag_of "$name"
    [[ $flag != *.png && $flag != *.npz ]] || flag=$(dirname "$flag")
    [[ -z $flag ]] || outputs+=("$flag")
  done
}

# check_image: --image is the name of one in a registry.
check_image() {
  [[ ${option[image]} =~ ^[A-Za-z0-9][A-Za-z0-9._:/@-]*$ ]] || die "--image=${option[image]} is no image's name"
}

# find_folder: `folder` is that of the job's own files: --folder, or WORKDIR/launch.
find_folder() {
  folder=${option[folder]-}
  if [[ -z $folder ]]; then
    flag_of workdir
    flag=${option[workdir]-$flag}
    [[ -n $flag ]] || die "--folder is missing: where the job's code and logs are"
    folder=${flag%/}/launch
  fi
  check_absolute --folder "$folder"
}

# find_venv: `venv` is the environment whose python is to run.
find_venv() {
  venv=${option[venv]-${VIRTUAL_ENV:-$ROOT/.venv}}
  [[ -x $venv/bin/python ]] ||
    die "$venv has no bin/python: give --venv=DIR, an environment with requirements.txt installed, or an image"
  venv=$(cd "$venv" && pwd)
}

# find_checkout: without an image, `venv`, and `code`, where the program starts: this checkout, or a copy of
# HEAD that is to be made in `folder`, as --code says.
find_checkout() {
  [[ -z ${option[mount]-} ]] || die "--mount is for containers: give --image too"
  find_venv
  code=$ROOT
  [[ ${option[code]} == revision ]] || return 0
  clean_revision "--code=here"
  code=$folder/code/$revision
}

# words_of LINE: `program` from a line of shell words, of which nothing is expanded.
words_of() {
  local words
  words=$(xargs printf '%s\n' <<<"$1" 2>/dev/null && echo .) || return 1
  words=${words%$'\n'.}
  mapfile -t program <<<"$words"
}

# check_array: the file of --array has one command a line, in place of a program; `commands` are its lines.
check_array() {
  local line k=0
  ((!${#program[@]})) || die "give either --array=FILE or a program behind --, not both"
  [[ -f ${option[array]} ]] || die "--array=${option[array]} is not a file"
  mapfile -t commands <"${option[array]}"
  ((${#commands[@]})) || die "--array=${option[array]} is empty: it has one command a line"
  for line in "${commands[@]}"; do
    k=$((k + 1))
    [[ -n ${line//[[:space:]]/} ]] || die "line $k of --array=${option[array]} is empty"
    words_of "$line" || die "line $k of --array=${option[array]} has a quote without an end"
  done
}

# ---- What has become of it

# end_word STATUS: how a run has ended, by its exit status.
end_word() {
  case $1 in
    0) echo FINISHED ;;
    "$STOPPED_STATUS") echo STOPPED ;;
    *) echo "FAILED($1)" ;;
  esac
}

# show_log FILE: all of it, and with --follow what comes.
show_log() {
  if [[ -n ${option[follow]-} ]]; then
    run tail -n +1 -F "$1"
  else
    run cat "$1"
  fi
}

# ---- Code by revision

# clean_revision: `revision` is HEAD, which the working tree must not differ from.
clean_revision() {
  local changed
  revision=$(git -C "$ROOT" rev-parse --verify --quiet HEAD 2>/dev/null) ||
    die "code goes by git revision, but $ROOT is no git checkout with a commit: use ${1-another way}"
  mapfile -t changed < <(git -C "$ROOT" status --porcelain)
  ((!${#changed[@]})) ||
    die "the working tree differs from revision ${revision:0:12} in ${#changed[@]} file(s), first '${changed[0]:3}': commit, or use ${1-another way}"
}

# copy_code FOLDER: writes `revision` there, if that is in the job's own folder and not there yet.
copy_code() {
  local code=$1
  [[ $code == "$folder/code/"* && ! -e $code ]] || return 0
  run mkdir -p "$code.new"
  # shellcheck disable=SC2016 # the inner shell's own arguments
  run bash -o pipefail -c 'git -C "$1" archive "$2" | tar -x -C "$3"' copy "$ROOT" "$revision" "$code.new"
  run mv "$code.new" "$code"
}

# pushed_revision: `revision` can be cloned from `repository`.
pushed_revision() {
  if [[ -n ${option[repository]-} ]]; then
    repository=${option[repository]}
  else
    repository=$(git -C "$ROOT" config --get remote.origin.url) ||
      die "this checkout has no remote named origin that a host could clone: give --repository=URL, or use --image"
    # A host has no key of the user's: https://HOST/PATH instead of git@HOST:PATH.
    [[ ! $repository =~ ^(ssh://)?git@([^:/]+)[:/](.+)$ ]] ||
      repository="https://${BASH_REMATCH[2]}/${BASH_REMATCH[3]}"
  fi
  [[ -n $(git -C "$ROOT" branch --remotes --contains "$revision" 2>/dev/null) ]] ||
    die "revision ${revision:0:12} is on no branch of a remote, a host could not clone it: git push, or use --image"
}

# ---- Storage that all hosts see

# mount_buckets: every gs://BUCKET/PATH among the program's arguments becomes /gcs/BUCKET/PATH, where
# Cloud Storage FUSE mounts the bucket. `buckets` are their names.
mount_buckets() {
  local i before bucket rest
  local pattern='^(|-{1,2}[A-Za-z0-9_.]+=)gs://([^/]*)(/.*)?$'
  for ((i = 0; i < ${#program[@]}; i++)); do
    [[ ${program[i]} =~ $pattern ]] || continue
    before=${BASH_REMATCH[1]} bucket=${BASH_REMATCH[2]} rest=${BASH_REMATCH[3]}
    [[ $bucket =~ ^[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]$ ]] ||
      die "'${program[i]}' names no bucket: it has the form gs://BUCKET/PATH"
    program[i]=$before/gcs/$bucket$rest
    [[ " ${buckets[*]-} " == *" $bucket "* ]] || buckets+=("$bucket")
    shared_places+=("/gcs/$bucket")
  done
}

# check_buckets BUCKET...: checkpoints are finished by renaming a folder, which a bucket of the flat kind
# cannot do at once.
check_buckets() {
  local bucket enabled describe
  for bucket; do
    describe=(gcloud storage buckets describe "gs://$bucket" --raw '--format=value(hierarchicalNamespace.enabled)')
    if [[ -n ${option[dry-run]-} ]]; then
      run "${describe[@]}"
    elif ! enabled=$("${describe[@]}"); then
      note "warning: gs://$bucket could not be looked at; it must exist, with a hierarchical namespace"
    elif [[ $enabled != [Tt]rue ]]; then
      die "gs://$bucket has no hierarchical namespace, which checkpoints need: gcloud storage buckets create gs://NEW --uniform-bucket-level-access --enable-hierarchical-namespace --location=..."
    fi
  done
}

# check_shared FOLDER...: each folder lies within a place that all hosts see.
check_shared() {
  local folder place found
  for folder; do
    found=""
    for place in "${shared_places[@]}"; do
      [[ $folder/ != "${place%/}"/* ]] || found=yes
    done
    [[ -n $found ]] ||
      die "'$folder' is not visible to all hosts: use gs://BUCKET/PATH, a folder within a volume that is mounted, or --shared=FOLDER for one that all hosts have"
    [[ "/$folder/" != */../* ]] || die "'$folder' holds '..'"
  done
}

# check_absolute WHAT FOLDER: a relative one would mean another folder on the host.
check_absolute() {
  [[ $2 == /* ]] || die "$1=$2 is relative, and the program starts in another folder: give the whole path"
}
