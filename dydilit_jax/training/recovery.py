"""Steps gone bad: which are, when a run goes back, and what it remembers of it.

A step is bad if its loss, gradients or updates are not finite (it then changed nothing, see
training/guard.py), or, where asked for, if its loss is far above the running median. After
`train.rollback_after` bad steps in a row the run goes back to the last good checkpoint, and on with
the batches after the bad ones, as PaLM did (arXiv 2204.02311, section 5.1). All of it is a function
of the losses, and is kept in every checkpoint: a run that was interrupted decides as one that was
not.
"""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

from dydilit_jax.config import TrainConfig
from dydilit_jax.errors import UserError
from dydilit_jax.training.guard import not_finite


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollback:
    """One return to a checkpoint.

    Attributes:
      step: of the checkpoint, 0 for the start.
      from_step: of the last bad step; the batches from the one to the other are not used again.
      reason: what was bad there.
    """

    step: int
    from_step: int
    reason: str


@dataclasses.dataclass(kw_only=True)
class Recovery:
    """What a run remembers of its bad steps.

    Attributes:
      skipped: steps that were not finite and changed nothing, since the start.
      streak: bad steps in a row, up to the newest.
      losses: of the newest good steps, as many as the median needs.
      rollbacks: since the start.
    """

    skipped: int = 0
    streak: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    rollbacks: list[Rollback] = dataclasses.field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it, exactly."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Recovery:
        """The inverse of `to_json`."""
        rollbacks = [Rollback(**each) for each in fields["rollbacks"]]
        return cls(**{**fields, "rollbacks": rollbacks})

    def review(self, values: dict[str, float], config: TrainConfig) -> str | None:
        """Takes note of a step's loss and norms; says what is bad about it, None if it is good."""
        problem = not_finite(values)
        if problem is not None:
            self.skipped += 1
        elif config.spike_factor:
            problem = self._spike(values["loss"], config)
        if problem is not None:
            self.streak += 1
            return problem
        self.streak = 0
        if config.spike_factor:
            self.losses = [*self.losses, values["loss"]][-config.spike_window :]
        return None

    def _spike(self, loss: float, config: TrainConfig) -> str | None:
        if len(self.losses) < config.spike_window:
            return None
        median = statistics.median(self.losses)
        if loss <= config.spike_factor * median:
            return None
        return f"loss is {loss:.4g}, above {config.spike_factor:g} times its median {median:.4g}"

    def rolled_back(
        self, restored: Recovery, step: int, from_step: int, reason: str, limit: int
    ) -> Recovery:
        """What to remember after a return to `step`, where `restored` was remembered.

        Raises:
          UserError: this would be return number `limit` + 1 to one checkpoint.
        """
        if sum(each.step == step for each in self.rollbacks) >= limit:
            where = f"checkpoint {step}" if step else "the start"
            raise UserError(
                f"{reason} at step {from_step}, after {limit} returns to {where}: training stops; "
                "nothing that was saved is lost. Lower optimizer.learning_rate, set "
                "optimizer.clip_norm, or compute in float32"
            )
        entry = Rollback(step=step, from_step=from_step, reason=reason)
        return Recovery(
            skipped=self.skipped,
            losses=list(restored.losses),
            rollbacks=[*self.rollbacks, entry],
        )


def due(step: int, every: int, span: int = 0) -> bool:
    """Whether a multiple of `every` is among the steps from `step - span` to `step`."""
    return every > 0 and step // every > (step - span - 1) // every
