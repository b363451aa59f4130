"""What a sweep sees of dydilit_jax.train, without the training: python fake_train.py WORKDIR ...

Takes the workdir's lock, writes a line of starts.txt, then metrics step by step and a checkpoint at
the end, or when SIGTERM comes; goes on from the checkpoint.
"""

import argparse
import fcntl
import json
import math
import os
import signal
import sys
import time
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=0.0, help="of a step")
    parser.add_argument("--boot", type=float, default=0.0, help="seconds until it has the lock")
    parser.add_argument("--rate", type=float, default=1.0, help="the loss is rate / step")
    parser.add_argument("--crash", type=int, default=0, help="fails at this step, once")
    parser.add_argument("--always", action="store_true", help="and every time")
    parser.add_argument("--mistake", action="store_true")
    args = parser.parse_args()
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stop.append(number))
    if args.mistake:
        print("error: model.width 7 is not divisible by model.attention.heads 2", file=sys.stderr)
        return 2

    time.sleep(args.boot)
    args.workdir.mkdir(parents=True, exist_ok=True)
    lock = os.open(args.workdir / "run.lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with (args.workdir / "doubles.txt").open("a") as file:
            file.write("started twice\n")
        print(f"error: workdir {str(args.workdir)!r} is in use by a run on here", file=sys.stderr)
        return 2
    folder = args.workdir / "checkpoints"
    step = max((int(each.name) for each in folder.glob("*")), default=0)
    with (args.workdir / "starts.txt").open("a") as file:
        file.write(f"{step} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}\n")
    with (args.workdir / "metrics.jsonl").open("a") as metrics:
        while step < args.steps and not stop:
            step += 1
            time.sleep(args.seconds)
            if step == args.crash and (args.always or not (args.workdir / "crashed").exists()):
                (args.workdir / "crashed").touch()
                print("Traceback (most recent call last):\n  in main", file=sys.stderr)
                print("MemoryError: no room for step", step, file=sys.stderr)
                return 1
            loss = args.rate / step
            record = {"step": step, "loss": loss, "steps_per_second": 1 / max(args.seconds, 1e-3)}
            metrics.write(json.dumps(record) + "\n")
            metrics.flush()
        (folder / str(step)).mkdir(parents=True, exist_ok=True)
        (folder / str(step) / "manifest.json").write_text("{}")
        if step == args.steps:
            metrics.write(json.dumps({"step": step, "quality": math.exp(-loss)}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
