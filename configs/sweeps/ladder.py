"""The ladder that isolates each idea of DyDiLA, on the digits, with three seeds.

Command:   python -m dydilit_jax.sweep --config=configs/sweeps/ladder.py --workdir=runs/ladder
Variants:  those of configs/digits.py; --config.train.steps=350 for a shorter look
Hardware:  a CPU; 24 runs of configs/digits.py's length one after the other, or --on=slurm, --on=gke
Then:      python -m dydilit_jax.sweep --workdir=runs/ladder --report=ladder.html

Every rung up to DyDiLA has the same width, depth and feed-forward, and adds one thing to the rung
before it. `softmax` is DiT, with its own heads and feed-forward.
"""

from pathlib import Path

from dydilit_jax.sweeps.notation import Runs, chain, fixed, minimize, product, seeds
from dydilit_jax.sweeps.runs import load_module

get_config = load_module(Path(__file__).parent.parent / "digits.py").get_config

SCORE = minimize("pixel_frechet")


def rung(name: str, *tags: str, **attention: object) -> Runs:
    """A run under this name, with these fields of model.attention."""
    fields = {f"model.attention.{field}": value for field, value in attention.items()}
    return fixed(fields, name=name, tags=["ladder", *tags])


SWEEP = product(
    chain(
        rung("1_relu", kind="relu", depthwise=0),
        rung("2_depthwise", kind="relu"),
        # phi at a fixed exponent is focused attention (FLatten).
        rung("3_phi", "focused", kind="focused"),
        rung("4_routed_exponent", projectors=0),
        rung("5_static_differential", projectors=1, lambdas=1),
        rung("6_routed_projectors", lambdas=1),
        rung("7_routed_lambda", "dydila"),
        fixed(name="softmax", tags=["baseline"], argument="attention=softmax"),
    ),
    seeds(3),
)
