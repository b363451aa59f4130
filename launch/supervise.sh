#!/usr/bin/env bash
# Runs a program on one machine until it has ended for good, and passes a SIGTERM on to it, once.
#
#     supervise.sh --max-restarts=N --pause=SECONDS --status=FILE -- program argument ...
#
# Exit status, and what FILE holds afterwards: 0, the program has finished; 2, a user's mistake, which
# trying again would not mend; 75, it was asked to stop before its end; else that of its last crash.
# A crash is tried again N times. A program that says 75, or was ended by a signal to stop, although this
# machine was not asked had a part on another machine that was: it is started again, which is not counted.
set -uo pipefail

restarts=3 pause=10 status_file=""
while (($#)); do
  case $1 in
    --max-restarts=*) restarts=${1#*=} ;;
    --pause=*) pause=${1#*=} ;;
    --status=*) status_file=${1#*=} ;;
    --)
      shift
      break
      ;;
    *)
      echo "error: supervise.sh does not know $1" >&2
      exit 2
      ;;
  esac
  shift
done

say() { printf '[supervise %s] %s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$*"; }

asked=false child=""
# The program has a session of its own: Ctrl-C in a terminal reaches it through here alone, since a
# second signal would end it before it has saved.
ask() {
  $asked || [[ -z $child ]] || kill -TERM "$child" 2>/dev/null
  asked=true
}
trap ask TERM INT

finish() {
  if [[ -n $status_file ]]; then
    echo "$1" >"$status_file.new" && mv "$status_file.new" "$status_file"
  fi
  exit "$1"
}

[[ -z $status_file ]] || rm -f "$status_file"
crashes=0
while :; do
  $asked && finish 75
  setsid -- "$@" &
  child=$!
  $asked && kill -TERM "$child" 2>/dev/null
  wait "$child"
  status=$?
  # A signal ends `wait`, not the program.
  while kill -0 "$child" 2>/dev/null; do
    wait "$child"
    status=$?
  done
  child=""
  case $status in
    0 | 2) finish $status ;;
    75 | 130 | 143) $asked || say "the run was stopped elsewhere; starting it again in $pause s" ;;
    *)
      $asked && finish $status
      crashes=$((crashes + 1))
      if ((crashes > restarts)); then
        say "ended with status $status; given up after $restarts restarts"
        finish $status
      fi
      say "ended with status $status; restart $crashes of $restarts in $pause s"
      ;;
  esac
  $asked && finish 75
  # In the background, so that a signal ends the pause.
  sleep "$pause" &
  wait $!
done
