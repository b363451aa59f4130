"""Compiles a run for accelerators that are not there, and says what it would take.

    python -m dydilit_jax.compile --config=configs/imagenet256.py:size=XL --topology=v5e:16x16 \\
        --config.mesh.fsdp=128 --config.model.rematerialisation=full

No accelerator is needed, but its compiler is: requirements-tpu.txt. Exits with 0 if the program
fits, with 1 if it does not.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from absl import flags

from dydilit_jax import cli
from dydilit_jax.config import Config
from dydilit_jax.errors import UserError, unknown_name
from dydilit_jax.training.topology import open_topology, parse_topology

_CONFIG = cli.define_config_flag()
_TOPOLOGY = flags.DEFINE_string("topology", None, "What to compile for, such as v5e:16x16.")
_WHAT = flags.DEFINE_string(
    "what", "train", "train: an optimizer step. sample: a batch. decode: its images."
)
_JSON = flags.DEFINE_string("json", None, "Write the account to this file as well.")
_SEARCH = flags.DEFINE_bool(
    "search", False, "Try meshes and rematerialisations, and rank those that fit."
)
_SEARCH_COMPILES = flags.DEFINE_integer(
    "search_compiles", 12, "Programs that --search compiles at most.", lower_bound=1
)
_GPU_TARGET = flags.DEFINE_string(
    "gpu_target", None, "For --topology=cuda:...: a file with XLA's GpuTargetConfig."
)


def main() -> None:
    """Compiles, prints the account and writes it."""
    cli.required(cli.flag_text("config"), "config")
    name = cli.required(_TOPOLOGY.value, "topology")
    parse_topology(name)
    config = Config.from_dict(_CONFIG.value)
    path = Path(_JSON.value) if _JSON.value else None
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise UserError(f"--json={path}: give a file in a folder that exists")
    from dydilit_jax.training import compile_report
    from dydilit_jax.training.lowering import PROGRAMS, compile_program

    if _WHAT.value not in PROGRAMS:
        raise unknown_name("program", _WHAT.value, PROGRAMS)
    if _SEARCH.value and _WHAT.value == "decode":
        raise UserError("--search is for train and sample: a host's devices decode image by image")
    topology = open_topology(name, Path(_GPU_TARGET.value) if _GPU_TARGET.value else None)
    if _SEARCH.value:
        result, fits = _search(config, topology)
    else:
        program = compile_program(config, topology, _WHAT.value)
        print(compile_report.text(program))
        result, fits = compile_report.report(program), program.fits
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n")
    if not fits:
        sys.exit(1)


def _search(config: Config, topology: Any) -> tuple[dict[str, Any], bool]:
    """Prints every candidate as it is done, then the best one's account."""
    from dydilit_jax.training import compile_report, compile_search

    tried = []
    for program in compile_search.search(config, topology, _WHAT.value, _SEARCH_COMPILES.value):
        tried.append(program)
        print(f"[{len(tried)}] {compile_search.line(program)}", flush=True)
    best = compile_search.ranked(tried)
    others = [program for program in tried if not program.fits]
    result = {"candidates": [compile_report.report(program) for program in [*best, *others]]}
    if not best:
        print("none of them fits")
        return result, False
    print("\nranked by the estimate without overlap:")
    for place, program in enumerate(best, 1):
        print(f"{place:>3}. {compile_search.line(program)}")
    print("\nthe first of them:\n")
    print(compile_report.text(best[0]))
    return result, True


if __name__ == "__main__":
    cli.run(main)
