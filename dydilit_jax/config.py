"""Every field of a run's config, its meaning and its default, in one place.

A config file (`configs/*.py`) returns `Config(...).to_dict()`, an ml_collections ConfigDict that
flags can override; `Config.from_dict` checks it and turns it back into these dataclasses.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import typing
from typing import Any, TypeVar

import ml_collections

from dydilit_jax.diffusion.flow import RectifiedFlow
from dydilit_jax.diffusion.gaussian import GaussianProcess
from dydilit_jax.errors import UserError, unknown_name
from dydilit_jax.models.config import FEEDFORWARDS, ModelConfig

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What goes in.

    Attributes:
      source: `digits`; `folder`, images in DATA_DIR/SPLIT/CLASS/; or the name of a data set that
        tfds prepared as ArrayRecord: `cifar10`, `imagenet2012`, `NAME/CONFIG`, `NAME:VERSION`.
      data_dir: where it is, local or `gs://...`; empty for tfds's own default.
      split: of it, in tfds's language: `train`, `train[:90%]`.
      classes: a file that names the classes to keep, one a line; empty for all.
      image_size: side in pixels that images are scaled and cropped to; 0 for model.image_size.
      latents: folder of the images' latents, as `encode` wrote it, read in their place; empty for
        pixels.
      batch_size: images in a step, over all processes and devices.
      horizontal_flip: mirror every second image, at random.
      read_threads: threads that read and transform ahead of use, in each worker.
      workers: processes that read and transform ahead of use; 0 for threads of the trainer alone.
      prefetch: batches that are placed on the devices ahead of use.
      on_error: an image that cannot be read is named, and `skip` takes the next one in its place,
        `stop` ends the run.
      max_errors: different images that a process may skip before the run ends.
    """

    source: str = "digits"
    data_dir: str = ""
    split: str = "train"
    classes: str = ""
    image_size: int = 0
    latents: str = ""
    batch_size: int = 256
    horizontal_flip: bool = False
    read_threads: int = 2
    workers: int = 0
    prefetch: int = 2
    on_error: str = "skip"
    max_errors: int = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """What stands between pixels and the latents that the network sees.

    Attributes:
      weights: a folder in diffusers' layout, or a name: `sd-vae-ft-ema`, `sd-vae-ft-mse`,
        `dc-ae-f32c32-sana-1.0`. Empty: the network sees pixels.
      revision: commit of the hub's repository in place of the pinned one; empty for that.
      sha256: checksum that the file of weights must have; empty for the name's own, if it is known.
      scaling_factor: what latents are multiplied with; 0 for the weights' own. Another than theirs
        is an error.
      dtype: `float32` or `bfloat16`, that it computes in.
    """

    weights: str = ""
    revision: str = ""
    sha256: str = ""
    scaling_factor: float = 0.0
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """What the network is trained for.

    Attributes:
      process: `flow` (rectified flow, as SiT) or `gaussian` (DiT's, with learned variance).
      flow: fields of diffusion/flow.py's RectifiedFlow.
      gaussian: fields of diffusion/gaussian.py's GaussianProcess.
    """

    process: str = "flow"
    flow: RectifiedFlow = RectifiedFlow()
    gaussian: GaussianProcess = GaussianProcess()


@dataclasses.dataclass(frozen=True, kw_only=True)
class InheritanceConfig:
    """Where the parameters start, as LiT (arXiv 2501.12976) inherits a DiT's.

    Attributes:
      checkpoint: weights that `convert` wrote, or a DiT's file; all they have in common with the
        network is taken from them at step 0. Empty: start from scratch.
    """

    checkpoint: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """A teacher's predictions as further terms of the loss (LiT's hybrid distillation).

    Attributes:
      teacher: weights of a network for the same process, as InheritanceConfig's; empty for none.
      prediction_weight: weight of the mean squared difference of the predictions (noise, velocity).
      variance_weight: the same of the learned variances, where both networks have one.
    """

    teacher: str = ""
    prediction_weight: float = 0.5
    variance_weight: float = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, its schedule, and the moving average of the parameters. Defaults: DiT's recipe.

    Attributes:
      learning_rate: peak learning rate.
      schedule: after the warm-up `constant`, or `cosine` or `linear` decay to zero.
      warmup_steps: steps of linear warm-up from zero.
      decay_steps: step at which a decaying schedule reaches zero; 0 for train.steps.
      b1, b2, eps, weight_decay: AdamW's. The decay applies to matrices and convolutions alone.
      clip_norm: gradients are scaled down to this global norm; 0 for no clipping.
      accumulation_steps: equal parts that a batch is computed in, one after the other, for less
        memory; gradients are added up in float32, and one update follows, that of the whole batch.
      mu_dtype: dtype of AdamW's first moment, `float32` or `bfloat16`. The second stays float32: a
        step changes it by a part in 1 / (1 - b2), which bfloat16 rounds away.
      ema_decay: decay of the moving average of the parameters, which is corrected for its start.
    """

    learning_rate: float = 1e-4
    schedule: str = "constant"
    warmup_steps: int = 0
    decay_steps: int = 0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    accumulation_steps: int = 1
    mu_dtype: str = "float32"
    ema_decay: float = 0.9999


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Axes of the device mesh; one of them may be -1, which takes the devices that remain.

    Attributes:
      data: copies of the parameters, each with its part of the batch. The outermost axis: several
        TPU slices lie along it, so it must be a multiple of their number.
      fsdp: parts that parameters and batch are cut into.
      tensor: parts that heads and hidden channels are cut into; a divisor of the heads.
      sequence: parts that an image's rows of tokens are cut into; a divisor of their number.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The length of training, and what is written on the way; 0 switches an interval off.

    Attributes:
      steps: optimizer steps.
      log_every: steps between progress lines and metrics.
      checkpoint_every: steps between checkpoints; the last step is always saved.
      keep_checkpoints: newest checkpoints that are kept.
      keep_every: checkpoints of multiples of so many steps are kept as well, for good.
      sample_every: steps between sample grids.
      nonfinite: a step whose loss, gradients or updates are not finite changes nothing; `skip`
        counts it and goes on, `stop` ends the run with an error.
      rollback_after: bad steps in a row after which the run goes back to the last good checkpoint
        and on with the batches after them.
      max_rollbacks: returns to one and the same checkpoint, after which the run ends with an error.
      spike_factor: a loss above so many times its running median is bad too; 0 for never.
      spike_window: good losses that the median is taken of.
      profile_at: first step of a profiler trace, in workdir/profiles; SIGUSR1 asks for one at any
        time.
      profile_steps: steps in a trace.
    """

    steps: int = 400_000
    log_every: int = 100
    checkpoint_every: int = 10_000
    keep_checkpoints: int = 3
    keep_every: int = 0
    sample_every: int = 10_000
    nonfinite: str = "skip"
    rollback_after: int = 10
    max_rollbacks: int = 3
    spike_factor: float = 0.0
    spike_window: int = 128
    profile_at: int = 0
    profile_steps: int = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How images are drawn.

    Attributes:
      sampler: a name in diffusion/samplers; empty for the process's own: `euler` or `ddpm`.
      steps: steps of the sampler.
      options: further fields of the sampler, `name=value,name=value`: `eta=0.5` of `ddim`,
        `dynamic_threshold=99.5` of any.
      guidance_scale: scale of classifier-free guidance; 1 for none.
      guidance_low, guidance_high: times between which guidance acts, 0 at data and 1 at noise.
      guidance_channels: guide the first so many channels; 0 for all (published DiT samples: 3).
      batch_size: images drawn at once.
      grid_rows: rows of the sample grid; its columns are the labels, ten of them at most.
    """

    sampler: str = ""
    steps: int = 50
    options: str = ""
    guidance_scale: float = 1.5
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    guidance_channels: int = 0
    batch_size: int = 250
    grid_rows: int = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What samples are measured by, on the way and when training ends.

    With `every`, scores go to TensorBoard and metrics.jsonl, named after their features. When
    training ends, small images (without `every`, or with the features `pixels` or `classifier`) get
    a report by pixels too.

    Attributes:
      num: class-balanced samples that are scored; 0 for no evaluation.
      every: steps between two scores, the last step among them; 0 for none on the way.
      features: `inception`, `dinov2`, `pixels` or `classifier`; see docs/evaluation.md.
      weights: file of inception's weights, or folder or name of dinov2's; empty to fetch them.
      reference: .npz of the real images; empty for one of the run's own, which `pixels` and
        `classifier` make.
    """

    num: int = 0
    every: int = 0
    features: str = "inception"
    weights: str = ""
    reference: str = ""

    @property
    def reports(self) -> bool:
        """Whether small images get a report by pixels when training ends."""
        return bool(self.num) and (not self.every or self.features in ("pixels", "classifier"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A run.

    Attributes:
      seed: of initialisation, data order, noise and dropped labels.
      model, data, autoencoder, diffusion, inheritance, distillation, optimizer, mesh, train,
        sampling, evaluation: their sections.
    """

    seed: int = 0
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    inheritance: InheritanceConfig = InheritanceConfig()
    distillation: DistillationConfig = DistillationConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self) -> None:
        for field, least in _LEAST.items():
            value = _get(self, field)
            if value < least:
                raise UserError(f"{field} must be at least {least}, got {value}")
        if self.optimizer.schedule not in SCHEDULES:
            raise unknown_name("schedule", self.optimizer.schedule, SCHEDULES)
        if self.train.nonfinite not in NONFINITE:
            raise unknown_name("train.nonfinite", self.train.nonfinite, NONFINITE)
        if 0 < self.train.spike_factor <= 1:
            raise UserError(
                f"train.spike_factor must be 0, or above 1; got {self.train.spike_factor}"
            )
        low, high = self.sampling.guidance_low, self.sampling.guidance_high
        if not 0.0 <= low <= high <= 1.0:
            raise UserError(
                f"the guidance interval must be 0 <= low <= high <= 1, got ({low}, {high})"
            )
        if self.evaluation.num == 1:
            raise UserError("evaluation.num must be 0, or at least 2 to have a spread; got 1")
        if self.evaluation.every and not self.evaluation.num:
            raise UserError("evaluation.every needs samples to score: set evaluation.num")
        if self.optimizer.mu_dtype not in MOMENT_DTYPES:
            raise unknown_name("moment dtype", self.optimizer.mu_dtype, MOMENT_DTYPES)
        if not 0.0 <= self.optimizer.ema_decay < 1.0:
            raise UserError(
                f"optimizer.ema_decay must be in [0, 1), got {self.optimizer.ema_decay}"
            )

    def to_dict(self) -> ml_collections.ConfigDict:
        """The config as a nested ConfigDict, whose fields flags can override."""
        return ml_collections.ConfigDict(dataclasses.asdict(self))

    def to_json(self) -> str:
        """The config as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_dict(cls, fields: Any) -> Config:
        """Checks a nested mapping and builds the config; missing fields take their defaults.

        Raises:
          UserError: an unknown field (names the nearest), a wrong type, or values that do not fit.
        """
        if isinstance(fields, ml_collections.ConfigDict):
            fields = fields.to_dict()
        return _build(cls, fields, "")

    @classmethod
    def from_json(cls, text: str) -> Config:
        """The inverse of `to_json`."""
        return cls.from_dict(json.loads(text))


SCHEDULES = ("constant", "cosine", "linear")
NONFINITE = ("skip", "stop")
MOMENT_DTYPES = ("float32", "bfloat16")

_LEAST = {
    "seed": 0,
    "data.batch_size": 1,
    "data.image_size": 0,
    "data.read_threads": 1,
    "autoencoder.scaling_factor": 0,
    "data.workers": 0,
    "data.prefetch": 0,
    "data.max_errors": 0,
    "optimizer.learning_rate": 0,
    "optimizer.warmup_steps": 0,
    "optimizer.decay_steps": 0,
    "optimizer.weight_decay": 0,
    "optimizer.clip_norm": 0,
    "optimizer.accumulation_steps": 1,
    "train.steps": 1,
    "train.log_every": 1,
    "train.checkpoint_every": 0,
    "train.keep_checkpoints": 1,
    "train.keep_every": 0,
    "train.sample_every": 0,
    "train.rollback_after": 1,
    "train.max_rollbacks": 1,
    "train.spike_factor": 0,
    "train.spike_window": 1,
    "train.profile_at": 0,
    "train.profile_steps": 1,
    "distillation.prediction_weight": 0,
    "distillation.variance_weight": 0,
    "sampling.steps": 1,
    "sampling.guidance_scale": 0,
    "sampling.guidance_channels": 0,
    "sampling.batch_size": 1,
    "sampling.grid_rows": 1,
    "evaluation.num": 0,
    "evaluation.every": 0,
}

# Sections whose fields may change between two starts of one run: where it runs, how long it goes
# on, what it writes and how its samples are drawn. None of them changes what a step computes.
CHANGEABLE = (
    "mesh.",
    "train.",
    "sampling.",
    "evaluation.",
    "data.data_dir",
    "data.latents",
    "data.read_threads",
    "data.workers",
    "data.prefetch",
    "data.on_error",
    "data.max_errors",
    "optimizer.accumulation_steps",
    "model.rematerialisation",
    "model.scan_layers",
    "model.attention.implementation",
)


def _get(config: object, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


def _build(cls: type[T], fields: Any, prefix: str) -> T:
    """An instance of the dataclass `cls` from a mapping, recursively."""
    hints = typing.get_type_hints(cls)
    if not isinstance(fields, dict):
        raise UserError(f"{prefix.rstrip('.')} must be a section of fields, got {fields!r}")
    values = {}
    for name, value in fields.items():
        if name not in hints:
            raise unknown_name("config field", prefix + name, [prefix + hint for hint in hints])
        values[name] = _value(hints[name], value, prefix + name)
    return cls(**values)


def _value(hint: Any, value: Any, path: str) -> Any:
    """`value` as the type `hint`, or an error that names the field."""
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, path + ".")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"config field {path} expects {hint.__name__}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"config field {path} must be finite, got {value}")
    return value


def flatten(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one level, with dots in the names."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def differing_fields(old: Config, new: Config) -> list[str]:
    """Lines "field: old -> new" for fields that make these two configs two different runs."""
    before, after = flatten(dataclasses.asdict(old)), flatten(dataclasses.asdict(new))
    return [
        f"{name}: {before.get(name)!r} -> {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and not name.startswith(CHANGEABLE)
    ]


def parse_argument(argument: str, **defaults: str) -> dict[str, str]:
    """Parses a config file's argument, `name=value,name=value`.

    Args:
      argument: what follows the colon in `--config=configs/digits.py:...`; may be empty.
      **defaults: the known names and their default values.

    Raises:
      UserError: an unknown name (names the nearest), or a part without `=`.
    """
    values = dict(defaults)
    for part in filter(None, (part.strip() for part in argument.split(","))):
        name, equals, value = part.partition("=")
        if not equals:
            near = difflib.get_close_matches(name, defaults, n=1)
            hint = f"did you mean {near[0]}=...?" if near else f"known: {', '.join(defaults)}"
            raise UserError(f"config argument {part!r} has the form name=value; {hint}")
        if name not in defaults:
            raise unknown_name("config argument", name, defaults)
        values[name] = value
    return values


def feedforward_for(attention: str, feedforward: str) -> str:
    """The feed-forward a config argument stands for: `auto` is `mlp` for softmax, else `mix`."""
    if feedforward == "auto":
        return "mlp" if attention == "softmax" else "mix"
    if feedforward not in FEEDFORWARDS:
        raise unknown_name("feed-forward", feedforward, ("auto", *FEEDFORWARDS))
    return feedforward
