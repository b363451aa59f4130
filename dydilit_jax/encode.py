"""Images to latents: python -m dydilit_jax.encode --config=configs/... --out=latents/...

The config says which images, which autoencoder and, by the network, which latents. Several
processes may write to one folder; an interrupted one goes on where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags

from dydilit_jax import cli
from dydilit_jax.config import Config
from dydilit_jax.errors import UserError, unknown_name

_CONFIG = cli.define_config_flag()
_CONNECT = cli.define_process_flags()
_OUT = flags.DEFINE_string("out", None, "Folder to write: new, empty, or begun by this command.")
_FLIPS = flags.DEFINE_bool(
    "flips", None, "Encode mirror images too; default: as data.horizontal_flip."
)
_DTYPE = flags.DEFINE_string("dtype", "bfloat16", "Numbers on disk: bfloat16 or float32.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Images at once.", lower_bound=1)
_SHARD_SIZE = flags.DEFINE_integer("shard_size", 4096, "Images in a shard.", lower_bound=1)
_PART = flags.DEFINE_string(
    "part", None, "INDEX/COUNT: do this part of the shards; default: JAX's process."
)


def parse_part(text: str) -> tuple[int, int]:
    """INDEX/COUNT as numbers.

    Raises:
      UserError: another form, or an index outside 0 to COUNT - 1.
    """
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError as error:
        raise UserError(f"--part={text} expects INDEX/COUNT, like 0/4") from error
    if not 0 <= index < count:
        raise UserError(f"--part={text}: the index must be from 0 to {count - 1}")
    return index, count


def main() -> None:
    """Encodes this process's part of the images."""
    cli.required(cli.flag_text("config"), "config")
    config = Config.from_dict(_CONFIG.value)
    out = Path(cli.required(_OUT.value, "out"))
    part = parse_part(_PART.value) if _PART.value else None
    if not config.autoencoder.weights:
        raise UserError(
            "autoencoder.weights is empty: --config.autoencoder.weights=FOLDER or a name, like "
            "sd-vae-ft-ema"
        )
    if _DTYPE.value not in ("bfloat16", "float32"):
        raise unknown_name("dtype", _DTYPE.value, ("bfloat16", "float32"))
    if part is None:
        _CONNECT()

    import jax
    from tqdm import tqdm

    from dydilit_jax.data import encoding
    from dydilit_jax.data.load import load_images
    from dydilit_jax.training.decoding import configured_autoencoder

    pretrained = configured_autoencoder(config.autoencoder)
    model, data = config.model, config.data
    autoencoder = pretrained.autoencoder
    source = load_images(
        data,
        image_size=model.image_size * autoencoder.downsampling,
        channels=autoencoder.config.in_channels,
    )
    flips = data.horizontal_flip if _FLIPS.value is None else _FLIPS.value
    manifest = encoding.plan(
        source,
        pretrained,
        name=data.source,
        split=data.split,
        flips=flips,
        dtype=_DTYPE.value,
        compute_dtype=config.autoencoder.dtype,
        shard_size=_SHARD_SIZE.value,
    )
    if manifest.latent_shape != (wanted := (model.image_size, model.image_size, model.channels)):
        raise UserError(
            f"the config's network takes latents of {wanted}, but images of {manifest.image_size} "
            f"pixels become {manifest.latent_shape}: change model.image_size, model.channels or "
            "the images"
        )
    process_index, process_count = part or (jax.process_index(), jax.process_count())
    encode = encoding.make_encoder(
        pretrained, flips=flips, batch_size=_BATCH_SIZE.value, devices=jax.local_devices()
    )
    own = range(process_index, manifest.shard_count, process_count)
    total = sum(len(manifest.shard_range(number)) for number in own)
    with tqdm(total=total, unit="image", desc="encoding") as bar:
        complete = encoding.encode_source(
            source,
            encode,
            manifest,
            out,
            batch_size=_BATCH_SIZE.value,
            read_threads=data.read_threads,
            max_skipped=data.max_errors if data.on_error == "skip" else 0,
            process_index=process_index,
            process_count=process_count,
            progress=bar.update,
            warn=lambda message: print(message, file=sys.stderr),
        )
    if complete is None:
        print(f"wrote part {process_index} of {process_count} to {out}: the others are not done")
    else:
        skipped = f", {len(complete.skipped)} skipped" if complete.skipped else ""
        print(
            f"{complete.count} latents {complete.latent_shape} of {complete.source} "
            f"{complete.split} in {len(complete.shards)} shards in {out}{skipped}"
        )


if __name__ == "__main__":
    cli.run(main)
