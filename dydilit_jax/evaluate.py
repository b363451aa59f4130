"""Scores images: python -m dydilit_jax.evaluate --workdir=runs/digits --features=classifier.

Three uses; docs/evaluation.md explains them and says when numbers can be compared:

    --workdir=RUN --reference=FILE.npz       draws --num images from a run's weights and scores them
    --images=PATH --reference=FILE.npz       scores a folder of PNG files, or an .npz
    --make_reference=FILE.npz --config=...   makes a reference of a config's data set
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from dydilit_jax import cli, sampling_flags
from dydilit_jax.config import Config
from dydilit_jax.errors import UserError, unknown_name

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from dydilit_jax.training.comparison import Choice, Comparison
    from dydilit_jax.training.score_job import ScoreJob
    from dydilit_jax.training.scoring import Images

DRAWN = 50_000  # images of an evaluation, where nothing else is asked for

_CONFIG = cli.define_config_flag()
_CONNECT = cli.define_process_flags()
_WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of a training run.")
_IMAGES = flags.DEFINE_string("images", None, "Score this folder of PNG files or .npz instead.")
_MAKE_REFERENCE = flags.DEFINE_string(
    "make_reference", None, "Write a reference of the data set of --config or --workdir here."
)
_REFERENCE = flags.DEFINE_string(
    "reference", None, "An .npz of the real images, in ADM's layout; default: the config's."
)
_NUM = flags.DEFINE_integer(
    "num", None, f"Images; default: {DRAWN:,} drawn ones, or all that there are.", lower_bound=1
)
_FEATURES = flags.DEFINE_string(
    "features", None, "inception, dinov2, pixels or classifier; default: the config's."
)
_WEIGHTS = flags.DEFINE_string(
    "weights", None, "File of inception's weights, or folder or name of dinov2's."
)
_SHA256 = flags.DEFINE_string("sha256", "", "Checksum that the file of weights must have.")
_VARIANT = flags.DEFINE_string(
    "variant", "", "adm or pytorch_fid of inception, dgm_eval or transformers of dinov2."
)
_SCORES = flags.DEFINE_string(
    "scores",
    "",
    "Of frechet,spatial_frechet,inception_score,kernel,precision_recall; empty for all.",
)
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.")
_EMA = flags.DEFINE_bool("ema", True, "Draw from the moving average of the parameters.")
_LABELS = flags.DEFINE_string("labels", "", "Labels to draw, like 0,1,2; empty for all of them.")
_RANDOM_LABELS = flags.DEFINE_bool(
    "random_labels", False, "Draw labels at random; otherwise they take turns."
)
_SAMPLING = sampling_flags.define()
_SEED = flags.DEFINE_integer("seed", 0, "Seed; an image depends on it, its index and label alone.")
_OUT = flags.DEFINE_string(
    "out", None, "The JSON; default: scores/step_STEP.json in the workdir, or scores.json."
)
_SAVE_NPZ = flags.DEFINE_string(
    "save_npz", None, "Write the images too, as the .npz that ADM's evaluator reads."
)
_SAVE_EVERY = flags.DEFINE_integer(
    "save_every", 5_000, "Images after which sums are saved, to go on after a kill.", lower_bound=1
)
_REFERENCE_IMAGES = flags.DEFINE_integer(
    "reference_images",
    10_000,
    "Images that --make_reference keeps for precision and recall.",
    lower_bound=4,
)


def check_flags() -> None:
    """Raises UserError for flags that contradict each other, before anything is loaded."""
    if _IMAGES.value and _MAKE_REFERENCE.value:
        raise UserError("--images and --make_reference are two things: give one of them")
    if _MAKE_REFERENCE.value and Path(_MAKE_REFERENCE.value).suffix != ".npz":
        raise UserError(f"--make_reference={_MAKE_REFERENCE.value} writes an .npz: name it so")
    if _MAKE_REFERENCE.value and Path(_MAKE_REFERENCE.value).exists():
        raise UserError(f"--make_reference={_MAKE_REFERENCE.value} exists: choose another file")
    if not (_IMAGES.value or _MAKE_REFERENCE.value or _WORKDIR.value):
        raise UserError("--workdir is missing, or --images or --make_reference in its place")
    if _SAVE_NPZ.value is not None:
        if _IMAGES.value or _MAKE_REFERENCE.value:
            raise UserError("--save_npz is for images that are drawn (--workdir)")
        if Path(_SAVE_NPZ.value).suffix != ".npz":
            raise UserError(f"--save_npz={_SAVE_NPZ.value} does not end in .npz")
        if not Path(_SAVE_NPZ.value).parent.is_dir():
            raise UserError(f"--save_npz={_SAVE_NPZ.value}: its directory does not exist")


def main() -> None:
    """Scores images, or makes a reference."""
    check_flags()
    _CONNECT()
    from dydilit_jax.training.score_job import Stopped

    try:
        if _MAKE_REFERENCE.value:
            _make_reference(Path(_MAKE_REFERENCE.value))
        elif _IMAGES.value:
            _score_files(Path(_IMAGES.value))
        else:
            _score_run(Path(_WORKDIR.value))
    except Stopped as stopped:
        print(stopped, flush=True)
        sys.exit(130)


def _score_run(workdir: Path) -> None:
    """Draws images from a run's weights and scores them."""
    from dydilit_jax.training.checkpoint import load_config
    from dydilit_jax.training.decoding import configured_autoencoder
    from dydilit_jax.training.score_job import ScoreJob
    from dydilit_jax.training.scoring import Drawing, check_count
    from dydilit_jax.training.state import OWN_SAMPLER, Network
    from dydilit_jax.training.trained import mesh_for, with_sampling

    config = with_sampling(load_config(workdir), _SAMPLING())
    num = _NUM.value or DRAWN
    check_count(num, _scores())
    labels, described = _labels(config, num)
    mesh = mesh_for(config)
    network = Network.create(config)
    step, parameters = _restore(workdir, network, mesh)
    pretrained = configured_autoencoder(config.autoencoder) if config.autoencoder.weights else None
    drawing = Drawing(network, config.sampling, mesh, pretrained and pretrained.autoencoder)
    comparison = _comparison(config, workdir, drawing.image_shape, mesh)
    sampling = dataclasses.asdict(config.sampling)
    for name in ("batch_size", "grid_rows"):  # They change no image.
        del sampling[name]
    sampling["sampler"] = config.sampling.sampler or OWN_SAMPLER[config.diffusion.process]
    settings = {
        "workdir": str(workdir.resolve()),
        "step": step,
        "parameters": "moving average" if _EMA.value else "as trained",
        "ema_decay": config.optimizer.ema_decay if _EMA.value else None,
        "process": config.diffusion.process,
        **sampling,
        "seed": _SEED.value,
        "num": num,
        **described,
        "image_shape": list(drawing.image_shape),
        "dtype": config.model.dtype,
        "autoencoder": config.autoencoder.weights or None,
        "autoencoder_name": pretrained and pretrained.weights.name,
        "autoencoder_checksum": pretrained and pretrained.weights.sha256,
        "autoencoder_dtype": config.autoencoder.dtype if pretrained else None,
    }
    job = ScoreJob(
        comparison=comparison,
        settings=settings,
        config=config,
        out=Path(_OUT.value) if _OUT.value else workdir / "scores" / f"step_{step:06d}.json",
        mesh=mesh,
        wanted=_scores(),
        save_every=_SAVE_EVERY.value,
        save_npz=Path(_SAVE_NPZ.value) if _SAVE_NPZ.value else None,
        labels=labels,
    )
    images = drawing.images(parameters, labels, _SEED.value)
    _run(job, images, num, config.sampling.batch_size, f"step {step}, {described['labels']}")


def _score_files(path: Path) -> None:
    """Scores images that are there."""
    from dydilit_jax.agreement import raised_together
    from dydilit_jax.config import MeshConfig
    from dydilit_jax.data.image_files import open_images
    from dydilit_jax.training.score_job import ScoreJob
    from dydilit_jax.training.scoring import check_count, read_images
    from dydilit_jax.training.sharding import make_mesh

    with raised_together():
        files = open_images(path)
        num = _NUM.value or len(files)
        if num > len(files):
            raise UserError(f"--num={num}, but {str(path)!r} has {len(files)} images")
        check_count(num, _scores())
    mesh = make_mesh(MeshConfig())
    config = _given_config()
    own = Path(_WORKDIR.value) if _WORKDIR.value else None
    comparison = _comparison(config, own, files.image_shape, mesh)
    job = ScoreJob(
        comparison=comparison,
        settings={
            "images": str(path.resolve()),
            "num": num,
            "image_shape": list(files.image_shape),
        },
        config=None,
        out=Path(_OUT.value or "scores.json"),
        mesh=mesh,
        wanted=_scores(),
        save_every=_SAVE_EVERY.value,
    )
    batch_size = _SAMPLING().get("batch_size", (config or Config()).sampling.batch_size)
    _run(job, read_images(files, mesh), num, batch_size, str(path))


def _run(job: ScoreJob, images: Images, num: int, batch_size: int, of: str) -> None:
    """Runs a job and prints its scores."""
    import jax

    from dydilit_jax.training.score_report import lines_of

    scores = job.run(images, num, batch_size)
    if jax.process_index() == 0 and scores is not None:
        print("\n".join(lines_of(scores)))
        print(f"{num} images of {of}: {job.out}", flush=True)


def _make_reference(out: Path) -> None:
    """Makes a reference of a config's data set."""
    import jax

    from dydilit_jax.agreement import raised_together
    from dydilit_jax.config import MeshConfig
    from dydilit_jax.data.load import load_images
    from dydilit_jax.training import comparison
    from dydilit_jax.training.request import claim
    from dydilit_jax.training.score_job import saving, unfinished_folder
    from dydilit_jax.training.scoring import SourceImages
    from dydilit_jax.training.sharding import make_mesh

    config = _given_config()
    if config is None:
        raise UserError("--make_reference needs --config, or --workdir: whose data set?")
    choice = _choice(config)
    mesh = make_mesh(MeshConfig())
    size, channels = _pixels_of(config)
    source = load_images(config.data, image_size=size, channels=channels)
    files = SourceImages(source)
    num = min(_NUM.value or len(files), len(files))
    extractor = comparison.load_features(
        choice,
        image_shape=files.image_shape,
        classifier=comparison.classifier_beside(out),
        source=source,
    )
    state = unfinished_folder(out)
    asked = {
        "source": f"{config.data.source} {config.data.split}",
        "classes": config.data.classes,
        "num": num,
        "kept": _REFERENCE_IMAGES.value,
        "image_shape": list(files.image_shape),
        "features_checksum": extractor.checksum,
        "features_description": extractor.description,
    }
    with raised_together():
        if jax.process_index() == 0:
            claim(state, asked)
    with saving(state / "sums", mesh, num, _SAVE_EVERY.value) as save:
        comparison.make_reference(
            out,
            files,
            extractor,
            mesh,
            num=num,
            kept=_REFERENCE_IMAGES.value,
            row_folder=state / "rows",
            state=state / "sums",
            save=save,
        )
    if jax.process_index() == 0:
        shutil.rmtree(state)
        print(f"wrote the reference of {num} images to {out}", flush=True)


def _given_config() -> Config | None:
    """The config of --config or of --workdir; None without either."""
    from dydilit_jax.training.checkpoint import load_config

    if cli.flag_text("config") is not None:
        return Config.from_dict(_CONFIG.value)
    return load_config(Path(_WORKDIR.value)) if _WORKDIR.value else None


def _pixels_of(config: Config) -> tuple[int, int]:
    """Side and channels of the images that a config's network is trained on, before encoding."""
    from dydilit_jax.training.decoding import configured_autoencoder

    model, data = config.model, config.data
    if not config.autoencoder.weights:
        return data.image_size or model.image_size, model.channels
    if data.image_size:
        return data.image_size, 3
    autoencoder = configured_autoencoder(config.autoencoder).autoencoder
    return model.image_size * autoencoder.downsampling, 3


def _choice(config: Config | None) -> Choice:
    """The features that flags ask for, or the config."""
    from dydilit_jax.training.comparison import Choice

    section = (config or Config()).evaluation
    return Choice(
        features=_FEATURES.value or section.features,
        weights=section.weights if _WEIGHTS.value is None else _WEIGHTS.value,
        sha256=_SHA256.value,
        variant=_VARIANT.value,
    )


def _comparison(
    config: Config | None, workdir: Path | None, shape: tuple[int, int, int], mesh: Mesh
) -> Comparison:
    """Features and reference that flags ask for, or the config."""
    from dydilit_jax.training.comparison import REFERENCES, open_comparison, real_images, wants_rows

    section = (config or Config()).evaluation
    reference = _REFERENCE.value or section.reference
    own = None
    if config is not None and workdir is not None:
        own = functools.partial(real_images, config, shape)
    return open_comparison(
        _choice(config),
        Path(reference) if reference else None,
        image_shape=shape,
        own=own,
        folder=(workdir or Path()) / REFERENCES,
        mesh=mesh,
        rows=wants_rows(_scores()),
    )


def _scores() -> tuple[str, ...]:
    from dydilit_jax.metrics.scoring import SCORES

    names = tuple(filter(None, (part.strip() for part in _SCORES.value.split(","))))
    for name in names:
        if name not in SCORES:
            raise unknown_name("score", name, SCORES)
    return names or SCORES


def _labels(config: Config, num: int) -> tuple[np.ndarray, dict[str, Any]]:
    """A label for each image, and in words what they are."""
    choices = sampling_flags.parse_labels(_LABELS.value, config.model.num_classes)
    if _RANDOM_LABELS.value:
        labels = np.random.default_rng(_SEED.value).choice(choices, num)
        kind = f"random labels of {len(choices)} classes"
    else:
        labels = np.resize(choices, num)
        kind = f"{len(choices)} classes in turn"
        if num % len(choices):
            kind += f", not balanced: {num} is no multiple"
    digest = hashlib.sha256(labels.astype(np.int64).tobytes()).hexdigest()
    return labels, {"labels": kind, "labels_checksum": digest}


def _restore(workdir: Path, network: Any, mesh: Mesh) -> tuple[int, Any]:
    """Step and parameters that the flags ask for."""
    from dydilit_jax.training.checkpoint import Checkpointer, has_checkpoint
    from dydilit_jax.training.optimizer import ema_parameters
    from dydilit_jax.training.state import abstract_state

    if not has_checkpoint(workdir):
        raise UserError(f"workdir {str(workdir)!r} has no checkpoint yet: train first")
    checkpointer = Checkpointer(workdir, only=_STEP.value)
    abstract = abstract_state(network, mesh)
    if _EMA.value:
        step, ema = checkpointer.restore_ema(abstract)
        return step, ema_parameters(ema, network.config.optimizer)
    state, _ = checkpointer.restore(abstract)
    return int(state.step), state.parameters


if __name__ == "__main__":
    cli.run(main)
