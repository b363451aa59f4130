"""Stands in for launch/slurm.sh and launch/gke.sh: records its calls, and says what it is told.

    python fake_launch.py FOLDER slurm|gke COMMAND --job=NAME ...

FOLDER/calls.jsonl gets a line for each call, FOLDER/NAME.commands the array's lines, and
FOLDER/NAME.states a state for each task, which a test rewrites. FOLDER/refusal is what to refuse a
start with; if FOLDER/kill_sweep is there, a start kills who asked for it.
"""

import json
import os
import signal
import sys
from pathlib import Path


def main() -> int:
    folder, place, command, *arguments = sys.argv[1:]
    root = Path(folder)
    with (root / "calls.jsonl").open("a") as file:
        file.write(json.dumps([place, command, *arguments]) + "\n")
    options = dict(each.removeprefix("--").split("=", 1) for each in arguments)
    job = options["job"]
    states = root / f"{job}.states"
    if command == "start":
        if (root / "refusal").exists():
            print((root / "refusal").read_text(), file=sys.stderr)
            return 2
        lines = Path(options["array"]).read_text().splitlines()
        (root / f"{job}.commands").write_text("\n".join(lines))
        states.write_text("\n".join(["PENDING"] * len(lines)))
        if (root / "kill_sweep").exists():
            (root / "kill_sweep").unlink()
            os.kill(os.getppid(), signal.SIGKILL)
        print(f"{place}-17")
    elif command == "status" and states.exists():
        for task, state in enumerate(states.read_text().splitlines()):
            name = f"17_{task}" if place == "slurm" else f"{job}-{task}"
            if state:
                print(f"{name}\t{state}\t0\tnode1")
    elif command == "logs":
        print(f"step 1\nValueError: of task {options['task']}\nbye")
    elif command == "delete":
        lines = states.read_text().splitlines()
        lines[int(options["task"])] = "STOPPED" if place == "slurm" else ""
        states.write_text("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
