"""How others name and lay out DiT's tensors, as data, and the way between theirs and ours.

Ours are nested dicts of float32 arrays: linear kernels (in, out), the joint projection (D, 3, D),
a patch's values in row, column, channel order, blocks stacked on a leading axis. Theirs are
PyTorch's: linear weights (out, in), patches as a convolution (D, C, p, p), each block its own.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from dydilit_jax.errors import UserError
from dydilit_jax.models.config import ModelConfig
from dydilit_jax.models.embeddings import sincos_position

Tensors = dict[str, np.ndarray]


class Transform(NamedTuple):
    """From their tensors of one parameter of one block to ours, and back."""

    to_ours: Callable[[list[np.ndarray]], np.ndarray]
    to_theirs: Callable[[np.ndarray, ModelConfig], list[np.ndarray]]


def _patch_to_theirs(kernel: np.ndarray, config: ModelConfig) -> list[np.ndarray]:
    patch = config.patch_size
    split = kernel.reshape(patch, patch, config.channels, config.width)
    return [split.transpose(3, 2, 0, 1)]


SAME = Transform(lambda tensors: tensors[0], lambda array, _: [array])
LINEAR = Transform(lambda tensors: tensors[0].T, lambda kernel, _: [kernel.T])
PATCH = Transform(
    lambda tensors: tensors[0].transpose(2, 3, 1, 0).reshape(-1, tensors[0].shape[0]),
    _patch_to_theirs,
)
# Queries, keys and values: three tensors, or one with the three in turn along its output.
SPLIT_QKV = Transform(
    lambda tensors: np.stack([tensor.T for tensor in tensors], axis=1),
    lambda kernel, _: [kernel[:, i].T for i in range(3)],
)
SPLIT_QKV_BIAS = Transform(np.stack, lambda bias, _: list(bias))
FUSED_QKV = Transform(
    lambda tensors: tensors[0].T.reshape(-1, 3, tensors[0].shape[1]),
    lambda kernel, _: [kernel.reshape(kernel.shape[0], -1).T],
)
FUSED_QKV_BIAS = Transform(
    lambda tensors: tensors[0].reshape(3, -1), lambda bias, _: [bias.reshape(-1)]
)


class Entry(NamedTuple):
    """One of our parameters and what it is made of.

    Attributes:
      path: ours; under blocks/ it is stacked.
      names: theirs, `{}` being the block. A parameter that is not under blocks/ and whose name has
        a block is one that they repeat in every block.
      transform: between the two.
    """

    path: str
    names: tuple[str, ...]
    transform: Transform = SAME

    @property
    def stacked(self) -> bool:
        """Whether each block has its own."""
        return self.path.startswith("blocks/")

    def names_at(self, block: int) -> list[str]:
        """Their names in this block."""
        return [name.format(block) for name in self.names]


def _linear(path: str, name: str) -> tuple[Entry, Entry]:
    return (
        Entry(f"{path}/kernel", (f"{name}.weight",), LINEAR),
        Entry(f"{path}/bias", (f"{name}.bias",)),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """All of a project's names.

    Attributes:
      name: ours for it.
      entries: every parameter.
      block: what the names of a block's tensors start with.
      position: name of the fixed position table.
      position_saved: whether their files hold it.
      time_frequency_shift: what their code has of ModelConfig's.
    """

    name: str
    entries: tuple[Entry, ...]
    block: str
    position: str
    position_saved: bool
    time_frequency_shift: int

    def depth(self, tensors: Mapping[str, Any]) -> int:
        """Blocks that the names speak of, at least one."""
        pattern = re.compile(re.escape(self.block) + r"\.(\d+)\.")
        found = [int(match[1]) for name in tensors if (match := pattern.match(name))]
        return 1 + max(found, default=0)

    def name_of(self, path: str) -> str:
        """Their (first) name of one of our paths, in the first block."""
        return next(entry.names_at(0)[0] for entry in self.entries if entry.path == path)

    def names(self, depth: int) -> set[str]:
        """Every name that a file must hold."""
        names = {self.position} if self.position_saved else set()
        for entry in self.entries:
            for block in range(depth):
                names |= set(entry.names_at(block))
        return names


DIT = Layout(
    name="dit",
    block="blocks",
    position="pos_embed",
    position_saved=True,
    time_frequency_shift=0,
    entries=(
        Entry("patch_embed/kernel", ("x_embedder.proj.weight",), PATCH),
        Entry("patch_embed/bias", ("x_embedder.proj.bias",)),
        *_linear("time_embed/hidden", "t_embedder.mlp.0"),
        *_linear("time_embed/out", "t_embedder.mlp.2"),
        Entry("label_embed/table/embedding", ("y_embedder.embedding_table.weight",)),
        Entry("blocks/attention/qkv/kernel", ("blocks.{}.attn.qkv.weight",), FUSED_QKV),
        Entry("blocks/attention/qkv/bias", ("blocks.{}.attn.qkv.bias",), FUSED_QKV_BIAS),
        *_linear("blocks/attention/out", "blocks.{}.attn.proj"),
        *_linear("blocks/feedforward/hidden", "blocks.{}.mlp.fc1"),
        *_linear("blocks/feedforward/out", "blocks.{}.mlp.fc2"),
        *_linear("blocks/modulation/linear", "blocks.{}.adaLN_modulation.1"),
        *_linear("final/modulation/linear", "final_layer.adaLN_modulation.1"),
        *_linear("final/linear", "final_layer.linear"),
    ),
)

_DIFFUSERS_BLOCK = "transformer_blocks.{}"
_DIFFUSERS_EMBEDDING = f"{_DIFFUSERS_BLOCK}.norm1.emb"
_DIFFUSERS_QKV = tuple(f"{_DIFFUSERS_BLOCK}.attn1.to_{letter}" for letter in "qkv")

DIFFUSERS = Layout(
    name="diffusers",
    block="transformer_blocks",
    position="pos_embed.pos_embed",
    position_saved=False,
    time_frequency_shift=1,
    entries=(
        Entry("patch_embed/kernel", ("pos_embed.proj.weight",), PATCH),
        Entry("patch_embed/bias", ("pos_embed.proj.bias",)),
        *_linear("time_embed/hidden", f"{_DIFFUSERS_EMBEDDING}.timestep_embedder.linear_1"),
        *_linear("time_embed/out", f"{_DIFFUSERS_EMBEDDING}.timestep_embedder.linear_2"),
        Entry(
            "label_embed/table/embedding",
            (f"{_DIFFUSERS_EMBEDDING}.class_embedder.embedding_table.weight",),
        ),
        Entry(
            "blocks/attention/qkv/kernel",
            tuple(f"{name}.weight" for name in _DIFFUSERS_QKV),
            SPLIT_QKV,
        ),
        Entry(
            "blocks/attention/qkv/bias",
            tuple(f"{name}.bias" for name in _DIFFUSERS_QKV),
            SPLIT_QKV_BIAS,
        ),
        *_linear("blocks/attention/out", f"{_DIFFUSERS_BLOCK}.attn1.to_out.0"),
        *_linear("blocks/feedforward/hidden", f"{_DIFFUSERS_BLOCK}.ff.net.0.proj"),
        *_linear("blocks/feedforward/out", f"{_DIFFUSERS_BLOCK}.ff.net.2"),
        *_linear("blocks/modulation/linear", f"{_DIFFUSERS_BLOCK}.norm1.linear"),
        *_linear("final/modulation/linear", "proj_out_1"),
        *_linear("final/linear", "proj_out_2"),
    ),
)

LAYOUTS = {layout.name: layout for layout in (DIT, DIFFUSERS)}


def detect_layout(tensors: Mapping[str, Any], source: str) -> Layout | None:
    """The layout that most names belong to; None for our own.

    Raises:
      UserError: no name is of any of them.
    """
    if any("/" in name for name in tensors):
        return None
    generic = {re.sub(r"^(\w*blocks)\.\d+\.", r"\1.{}.", name) for name in tensors}
    common = {
        layout: len(generic & {name for entry in layout.entries for name in entry.names})
        for layout in LAYOUTS.values()
    }
    best = max(common, key=lambda layout: common[layout])
    if not common[best]:
        raise UserError(
            f"{source} holds no DiT: none of its {len(tensors)} tensors has a name of the layouts "
            f"{', '.join(['own', *LAYOUTS])}"
        )
    return best


def to_ours(layout: Layout, tensors: Tensors, depth: int) -> dict:
    """Our parameters, from a file whose names and shapes are checked.

    Raises:
      UserError: a parameter that they repeat in every block is not the same in all of them.
    """
    flat: dict[str, np.ndarray] = {}
    for entry in layout.entries:
        blocks = [[tensors[name] for name in entry.names_at(i)] for i in range(depth)]
        if entry.stacked:
            flat[entry.path] = np.stack([entry.transform.to_ours(block) for block in blocks])
            continue
        for i, block in enumerate(blocks):
            if not np.array_equal(block[0], blocks[0][0]):
                raise UserError(
                    f"{entry.names_at(i)[0]} differs from {entry.names_at(0)[0]}: this network "
                    "has one embedding of time and label for all blocks"
                )
        flat[entry.path] = entry.transform.to_ours(blocks[0])
    contiguous = {path: np.ascontiguousarray(array) for path, array in flat.items()}
    return traverse_util.unflatten_dict(contiguous, sep="/")


def to_theirs(layout: Layout, config: ModelConfig, parameters: dict) -> Tensors:
    """Their tensors by name, views where possible; the inverse of `to_ours`."""
    flat = traverse_util.flatten_dict(parameters, sep="/")
    tensors = dict(_their_tensors(layout, config, flat))
    if layout.position_saved:
        tensors[layout.position] = sincos_position(config.grid, config.width)[None]
    return tensors


def _their_tensors(
    layout: Layout, config: ModelConfig, flat: dict[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    for entry in layout.entries:
        for i in range(config.depth):
            array = np.asarray(flat[entry.path][i] if entry.stacked else flat[entry.path])
            yield from zip(entry.names_at(i), entry.transform.to_theirs(array, config), strict=True)


def representable(layout: Layout, config: ModelConfig) -> None:
    """Raises UserError unless the network is a DiT, the only one that their layouts can hold."""
    needed: dict[str, tuple[Any, Any]] = {
        "attention.kind": (config.attention.kind, "softmax"),
        "attention.depthwise": (config.attention.depthwise, 0),
        "attention.qkv_bias": (config.attention.qkv_bias, True),
        "feedforward.kind": (config.feedforward.kind, "mlp"),
        "position": (config.position, "sincos"),
    }
    if layout is DIFFUSERS:
        hidden = config.feedforward.hidden(config.width)
        needed["feedforward.ratio"] = (hidden / config.width, 4.0)
    wrong = [
        f"{name} {is_!r} (not {must!r})" for name, (is_, must) in needed.items() if is_ != must
    ]
    if wrong:
        raise UserError(
            f"layout {layout.name} holds a DiT alone, this network has {', '.join(wrong)}: "
            "write it in the layout own"
        )
