"""What a run knows of itself besides its arrays, and what it does about an update that was skipped."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from lumina.config import GuardConfig
from lumina.errors import DoNotRetryError


@dataclass
class Progress:
    """Saved with each checkpoint, as plain JSON values."""

    rows: int = 0  # rows consumed, in the run's order
    best_loss: float | None = None  # lowest held-out loss of the stage
    best_step: int | None = None
    last: dict[str, Any] | None = None  # the last evaluation
    last_step: int | None = None  # when it was
    evaluations_without_improvement: int = 0  # in the last stage: the others have the steps that they were given
    passed: list[list[int]] = field(default_factory=list)  # [first, last] steps whose batches are passed over
    rewinds: int = 0
    stage: int = 0  # of the last evaluation

    def evaluated(self, step: int, result: dict[str, Any], loss: float, stage: int = 0, last: bool = True) -> bool:
        """Take note of an evaluation; whether it is the best of its stage so far, by `loss`. A new stage begins anew, and only
        the last one can bring patience to its end: the batches of a step never depend on what an evaluation found."""
        self.last, self.last_step = result, step
        if stage != self.stage:
            self.stage, self.best_loss, self.evaluations_without_improvement = stage, None, 0
        better = math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss)
        if better:
            self.best_loss, self.best_step, self.evaluations_without_improvement = loss, step, 0
        else:
            self.evaluations_without_improvement += last
        return better

    def without_improvement(self, patience: int) -> bool:
        """Whether `patience` evaluations (0: any number) have brought nothing."""
        return 0 < patience <= self.evaluations_without_improvement

    def passes_over(self, step: int) -> bool:
        return any(first <= step <= last for first, last in self.passed)

    def rewound(self, before: "Progress", first: int, last: int) -> "Progress":
        """This progress, of an older checkpoint, after a rewind from `before` that passes over the steps `first` to `last`."""
        return dataclasses.replace(self, passed=[*before.passed, [first, last]], rewinds=before.rewinds + 1)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def must_rewind(guard: GuardConfig, step: dict[str, Any], rewinds: int) -> bool:
    """What to do about a skipped update: True rewinds, False goes on without it.

    Args:
        step: its `step`, `loss`, `gradient_norm`, `skipped` (how many in a row) and the `row_numbers` of its batch.
        rewinds: that the run has behind it.

    Raises:
        DoNotRetryError: the retries are used up.
    """
    spike = math.isfinite(step["loss"]) and math.isfinite(step["gradient_norm"])
    if spike and guard.spike_action == "rewind":
        if rewinds >= guard.max_rewinds:
            raise DoNotRetryError(
                f"{diagnosis(step)}, after {rewinds} rewinds (guard.max_rewinds): the loss keeps jumping; lower "
                "optim.learning_rate (with --accept-changes), raise guard.spike_sigmas, or look at the rows"
            )
        return True
    if step["skipped"] > guard.max_skips:
        works = (
            "raise guard.spike_sigmas, or lower optim.learning_rate"
            if spike
            else "lower optim.learning_rate or optim.clip_norm, compute in float32, or look at the rows"
        )
        raise DoNotRetryError(
            f"{diagnosis(step)}; {step['skipped']} updates in a row were skipped: {works} (a changed field needs "
            f"--accept-changes); a larger guard.max_skips passes over more; the checkpoints are from before"
        )
    return False


def diagnosis(step: dict[str, Any]) -> str:
    """What was wrong with an update, in words."""
    loss, norm = step["loss"], step["gradient_norm"]
    rows = ", ".join(map(str, step["row_numbers"][:8])) + (", ..." if len(step["row_numbers"]) > 8 else "")
    if not math.isfinite(loss):
        what = f"loss is {loss}"
    elif not math.isfinite(norm):
        what = f"loss is {loss:.3f} but the gradient's norm is {norm}"
    else:
        what = f"loss jumped to {loss:.3f}"
    return f"step {step['step']}: {what} (rows {rows})"
