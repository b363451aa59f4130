"""Where the weights of published autoencoders come from, and how their files are known."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from dydilit_jax.autoencoders.dc import DCConfig
from dydilit_jax.autoencoders.kl import KLConfig
from dydilit_jax.errors import UserError, unknown_name
from dydilit_jax.models.pretrained.files import CONFIG_FILE, DIFFUSERS_FILE, find_weights

UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubWeights:
    """Published weights on the Hugging Face hub.

    Attributes:
      repo: their repository.
      revision: the commit that is fetched.
      sha256: checksum of the file of weights; empty where it is not known here, and the user's
        checksum is the only one.
      file: name of the file of weights.
    """

    repo: str
    revision: str
    sha256: str
    file: str = DIFFUSERS_FILE


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnownWeights(HubWeights):
    """Those of an autoencoder.

    Attributes:
      scaling_factor: what the latents are multiplied with.
      sizes: that their config.json gives.
    """

    scaling_factor: float
    sizes: KLConfig | DCConfig


# The encoders of the first two are the same; they differ in their decoders.
KNOWN = {
    "sd-vae-ft-ema": KnownWeights(
        repo="stabilityai/sd-vae-ft-ema",
        revision="f04b2c4b98319346dad8c65879f680b1997b204a",
        sha256="32db726da04f06c1b6b14c0043ce115cc87a501482945c5add89a40d838fcb46",
        scaling_factor=0.18215,
        sizes=KLConfig(),
    ),
    "sd-vae-ft-mse": KnownWeights(
        repo="stabilityai/sd-vae-ft-mse",
        revision="31f26fdeee1355a5c34592e401dd41e45d25a493",
        sha256="a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
        scaling_factor=0.18215,
        sizes=KLConfig(),
    ),
    "dc-ae-f32c32-sana-1.0": KnownWeights(
        repo="mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers",
        revision="ca69e17e97609e64ce055115a6515215109b1f50",
        sha256="",
        scaling_factor=0.41407,
        sizes=DCConfig(),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """A file of weights on this machine.

    Attributes:
      path: the file.
      sha256: its checksum.
      name: of the known weights that it is, by its checksum or by the pinned revision that it was
        fetched from; `unknown` otherwise.
    """

    path: Path
    sha256: str
    name: str


def known_name(weights: str) -> str | None:
    """The name in KNOWN of weights that may have their owner before it; None for others."""
    return next((name for name, known in KNOWN.items() if weights in (name, known.repo)), None)


def locate(weights: str, *, revision: str = "", sha256: str = "") -> WeightsFile:
    """Finds weights in a folder, or fetches them by their name.

    Args:
      weights: a folder (or file) in diffusers' layout, or a name in KNOWN, with or without its
        owner.
      revision: commit, branch or tag to fetch in place of the pinned one.
      sha256: checksum that the file must have; default: the known one of the name.

    Raises:
      UserError: neither a path nor a known name, weights that cannot be fetched, a wrong checksum,
        or a folder named after other weights than it holds.
    """
    path = Path(weights).expanduser()
    name = known_name(weights)
    if path.exists():
        found = find_weights(path / "vae" if (path / "vae").is_dir() else path)
        return _checked(found, sha256, None, path.resolve().name)
    if name is None:
        raise UserError(
            f"weights {weights!r}: no such file or folder, and "
            f"{unknown_name('autoencoder', weights, KNOWN)}"
        )
    known = KNOWN[name]
    file = fetch(known, revision or known.revision)
    pinned = revision in ("", known.revision)
    return _checked(file, sha256 or (known.sha256 if pinned else ""), name if pinned else None, "")


def identity(weights: str, *, sha256: str = "") -> dict[str, str]:
    """What tells these weights from others without fetching them, as fields of a manifest.

    Args:
      weights, sha256: as `locate`'s.

    Raises:
      UserError: as `locate`'s, but for what only fetching would show.
    """
    if sha256:
        return {"weights_sha256": sha256.lower()}
    name = known_name(weights)
    if name is None or Path(weights).expanduser().exists():
        return {"weights_sha256": locate(weights).sha256}
    if KNOWN[name].sha256:
        return {"weights_sha256": KNOWN[name].sha256}
    return {"autoencoder": name}


def _checked(file: Path, wanted: str, fetched: str | None, folder: str) -> WeightsFile:
    digest = sha256_of(file)
    if wanted and digest != wanted.lower():
        whose = next((name for name, known in KNOWN.items() if known.sha256 == digest), "")
        raise UserError(
            f"{str(file)!r} has the checksum {digest}{f' (of {whose})' if whose else ''}, expected "
            f"{wanted.lower()}{_of_name(wanted)}: it is damaged or other weights; fetch it again"
        )
    name = next((name for name, known in KNOWN.items() if known.sha256 == digest), None)
    if name is not None and folder in KNOWN and folder != name:
        raise UserError(
            f"{str(file)!r} holds {name} by its checksum, though the folder is named {folder}"
        )
    return WeightsFile(path=file, sha256=digest, name=name or fetched or UNKNOWN)


def _of_name(sha256: str) -> str:
    named = [name for name, known in KNOWN.items() if known.sha256 == sha256.lower()]
    return f" (of {named[0]})" if named else ""


def sha256_of(file: Path) -> str:
    """Checksum of a file, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fetch(known: HubWeights, revision: str) -> Path:
    """Fetches weights and their config.json from the hub, or finds them in its cache.

    Raises:
      UserError: huggingface_hub is missing, or the files cannot be had.
    """
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise UserError(
            f"fetching {known.repo} needs huggingface_hub: pip install huggingface_hub, or give a "
            f"folder with its {CONFIG_FILE} and {known.file}"
        ) from error
    try:
        hf_hub_download(known.repo, CONFIG_FILE, revision=revision)
        return Path(hf_hub_download(known.repo, known.file, revision=revision))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"cannot fetch {known.repo} at revision {revision} ({reason}): get its {CONFIG_FILE} "
            f"and {known.file} where there is a connection, and give their folder"
        ) from error
