"""What a rematerialised block keeps for the backward pass, by name of `model.rematerialisation`.

    dots      results of linear maps, the routed projections among them, and routers' logits
    full      nothing
    offload   what `dots` keeps, in the host's memory

They are told by a name (linear.kept) and not as `dot_general`: rules of one's own hide a product
from a policy, in linear.py (bfloat16), in the routed projection and in every kernel. Computed again
are then norms, activations, depthwise convolutions and the attention core, as XLA or as a kernel
has it: O(N d^2) a head, little beside the maps. The logits, n numbers a token, are kept so that the
backward pass takes the routes of the forward pass, whatever the rounding of what is computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from dydilit_jax.models.linear import KEPT

POLICIES: dict[str, Callable[..., Any]] = {
    "dots": jax.checkpoint_policies.save_only_these_names(KEPT),
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[KEPT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
