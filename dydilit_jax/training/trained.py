"""A network with its parameters, to draw from: a run's average, or weights from a file.

load_run("runs/digits").draw(labels)
load_weights("DiT-XL-2-256x256.pt", autoencoder="sd-vae-ft-mse").draw(labels)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dydilit_jax.config import Config, MeshConfig
from dydilit_jax.data.load import label_names
from dydilit_jax.errors import UserError
from dydilit_jax.models.pretrained import Pretrained, read_pretrained
from dydilit_jax.models.pretrained.api import OWN
from dydilit_jax.models.pretrained.files import find_weights
from dydilit_jax.models.pretrained.sit import from_sit
from dydilit_jax.training.checkpoint import Checkpointer, has_checkpoint, load_config
from dydilit_jax.training.decoding import Decode, make_decoder
from dydilit_jax.training.generation import generate_images
from dydilit_jax.training.optimizer import ema_parameters
from dydilit_jax.training.sharding import check_model, make_mesh, parameter_shardings
from dydilit_jax.training.state import Network, abstract_state

PIXEL_CHANNELS = (1, 3)  # what can be drawn without an autoencoder
# What DiT's and SiT's own code samples with: 250 steps, and guidance of the first three channels.
THEIR_STEPS, THEIR_GUIDED = 250, 3


@dataclasses.dataclass(frozen=True)
class Trained:
    """A network to draw from.

    Attributes:
      network: structure and process; its config says how to sample.
      parameters: on the mesh.
      mesh: what images are drawn over.
      name: for people: `step 1400`, or a file's name.
      title: for pictures: `digits, step 1400`.
      labels: names of the classes.
      identity: plain values that tell these parameters from any others.
    """

    network: Network
    parameters: Any
    mesh: Mesh
    name: str
    title: str
    labels: list[str]
    identity: dict[str, Any]

    @property
    def config(self) -> Config:
        """The run's, or what the file of weights stands for."""
        return self.network.config

    @functools.cached_property
    def decode(self) -> Decode:
        """Outputs (b, h, w, c) to images (b, H, W, C), through the autoencoder if there is one.

        Raises:
          UserError: as make_decoder.
        """
        config = self.config
        return make_decoder(config.autoencoder, channels=config.model.channels)

    def batches(self, labels: np.ndarray, *, seed: int = 0, first: int = 0) -> Iterator[np.ndarray]:
        """Outputs for labels (n,), from index `first` on, batch by batch; see generate_images."""
        return generate_images(
            self.network,
            self.parameters,
            labels,
            seed=seed,
            config=self.config.sampling,
            mesh=self.mesh,
            first=first,
        )

    def draw(self, labels: Any, *, seed: int = 0) -> np.ndarray:
        """Images (n, H, W, C) float32, nominally in [-1, 1], of labels (n,).

        Raises:
          UserError: a label outside the classes, or as `decode`.
        """
        decode = self.decode
        wanted = np.asarray(labels)
        return np.concatenate([decode(batch) for batch in self.batches(wanted, seed=seed)])


def load_run(workdir: Path | str, **sampling: Any) -> Trained:
    """The averaged parameters of a run's newest checkpoint.

    Args:
      workdir: of the run.
      **sampling: fields of the config's section, in place of the run's: `guidance_scale=2.0`.

    Raises:
      UserError: no such run, no checkpoint, or a sampler that does not fit.
    """
    workdir = Path(workdir)
    config = load_config(workdir)
    if not has_checkpoint(workdir):
        raise UserError(f"workdir {str(workdir)!r} has no checkpoint yet: train first")
    config = with_sampling(config, sampling)
    mesh = mesh_for(config)
    network = Network.create(config)
    step, ema = Checkpointer(workdir).restore_ema(abstract_state(network, mesh))
    return Trained(
        network,
        ema_parameters(ema, config.optimizer),
        mesh,
        f"step {step}",
        f"{config.data.source}, step {step}",
        label_names(config),
        {"workdir": str(workdir.resolve()), "step": step},
    )


def load_weights(
    path: Path | str,
    *,
    sit: bool = False,
    heads: int | None = None,
    time_frequency_shift: int | None = None,
    autoencoder: str = "",
    **sampling: Any,
) -> Trained:
    """A network from a file or folder of weights, in any layout that `convert` reads.

    Args:
      path: as read_pretrained.
      sit: the weights are a SiT's, which has DiT's names.
      heads: of an official DiT of an unknown width.
      time_frequency_shift: 0 if trained with the official code, 1 if with diffusers'; None for
        that of the layout.
      autoencoder: what decodes latents, as AutoencoderConfig.weights; empty for what an export of
        ours names, or a diffusers pipeline has beside.
      **sampling: fields of SamplingConfig, in place of the export's or of DiT's own.

    Raises:
      UserError: weights that cannot be read or say too little, latents without an autoencoder, or
        a sampler that does not fit.
    """
    file = find_weights(Path(path))
    pretrained = read_pretrained(path, heads=heads)
    if sit:
        if "diffusion" in pretrained.extra:
            raise UserError(
                f"{str(path)!r} says its own process in its config.json: it is no file of SiT's "
                "project, leave out --sit"
            )
        pretrained = from_sit(pretrained, str(path))
    if time_frequency_shift is not None:
        model = dataclasses.replace(pretrained.config, time_frequency_shift=time_frequency_shift)
        pretrained = pretrained._replace(config=model)
    config = with_sampling(weights_config(pretrained, file, autoencoder), sampling)
    network = Network.create(config)
    if network.out_channels != pretrained.out_channels:
        raise UserError(
            f"{str(file)!r} puts out {pretrained.out_channels} channels, its process "
            f"{config.diffusion.process} wants {network.out_channels}"
        )
    mesh = mesh_for(config)
    parameters = jax.device_put(
        pretrained.parameters, parameter_shardings(pretrained.parameters, mesh)
    )
    stat = file.stat()
    identity = {
        "weights": str(file.resolve()),
        "bytes": stat.st_size,
        "modified": stat.st_mtime_ns,
        "sit": sit,
        "heads": config.model.attention.heads,
        "time_frequency_shift": config.model.time_frequency_shift,
        "autoencoder": config.autoencoder.weights,
    }
    names = [str(label) for label in range(config.model.num_classes)]
    name = Path(path).absolute().name
    return Trained(network, parameters, mesh, name, name, names, identity)


def weights_config(pretrained: Pretrained, file: Path, autoencoder: str = "") -> Config:
    """The config that weights stand for: what their config.json keeps, else what DiT has.

    Args:
      pretrained: the weights.
      file: that they were read from.
      autoencoder: see load_weights.

    Raises:
      UserError: a config.json with sections of no config, no process, or latents that nothing
        decodes.
    """
    kept, channels = pretrained.extra, pretrained.config.channels
    diffusion, sampling = kept.get("diffusion"), kept.get("sampling", {})
    if diffusion is None:
        if pretrained.layout == OWN and "source" not in kept:
            # Ours, and not converted from a DiT: it might be anything.
            raise UserError(
                f"the config.json beside {str(file)!r} has no section diffusion, which says what "
                "the network was trained for: write it with convert"
            )
        learned = pretrained.out_channels != channels
        diffusion = {"process": "gaussian", "gaussian": {"learned_variance": learned}}
    if "step" not in kept:  # not of a run of ours
        guided = THEIR_GUIDED if channels > THEIR_GUIDED else 0
        sampling = {"steps": THEIR_STEPS, "guidance_channels": guided} | sampling
    decoder = kept.get("autoencoder", {})
    if autoencoder or not decoder:
        decoder = {"weights": autoencoder or _beside(file)}
    try:
        config = Config.from_dict(
            {
                "model": dataclasses.asdict(pretrained.config),
                "diffusion": diffusion,
                "sampling": sampling,
                "autoencoder": decoder,
            }
        )
    except UserError as error:
        raise UserError(f"the config.json beside {str(file)!r}: {error}") from error
    if not config.autoencoder.weights and channels not in PIXEL_CHANNELS:
        raise UserError(
            f"{str(file)!r} draws latents of {channels} channels: say what decodes them, for "
            "Stable Diffusion's --vae=sd-vae-ft-mse, or a folder in diffusers' layout"
        )
    return config


def _beside(file: Path) -> str:
    """The autoencoder of the diffusers pipeline that the weights are of; empty if there is none."""
    folder = file.parent
    autoencoder = folder.parent / "vae"
    return str(autoencoder) if folder.name == "transformer" and autoencoder.is_dir() else ""


def with_sampling(config: Config, sampling: dict[str, Any]) -> Config:
    """The config with fields of its section `sampling` in place of its own, through its checks."""
    section = dataclasses.asdict(config.sampling) | sampling
    return Config.from_dict(dataclasses.asdict(config) | {"sampling": section})


def mesh_for(config: Config) -> Mesh:
    """The run's mesh; all devices for the batch where it was trained on others."""
    try:
        mesh = make_mesh(config.mesh)
    except UserError:
        mesh = make_mesh(MeshConfig())
    check_model(config.model, mesh.shape)
    return mesh
