"""Position in a stage: one immutable value that converts to plain JSON and needs no other file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Window:
    """Sums since the last metrics row; checkpointed, so that a resumed run writes the same rows."""

    loss_sum: float = 0.0
    clean_correct: int = 0
    robust_correct: int = 0
    images: int = 0
    steps: int = 0


@dataclass(frozen=True)
class Progress:
    """Position in a stage: `step` optimizer steps are done out of `total_steps`."""

    step: int
    steps_per_epoch: int
    total_steps: int
    window: Window = Window()
    best_step: int | None = None
    """Checkpoint step with the highest robust accuracy on the held-out images so far."""
    best_robust_accuracy: float = -1.0
    level: int = 0
    """Number of times that the attack was strengthened because training overfitted to it."""
    good_step: int | None = None
    """Last epoch end at which a check found no overfitting; None before the first such check."""

    @property
    def at_epoch_end(self) -> bool:
        return self.step > 0 and self.step % self.steps_per_epoch == 0

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps

    def after_step(self, window: Window) -> Progress:
        return replace(self, step=self.step + 1, window=window)

    def after_window(self) -> Progress:
        """The same position with empty sums, once they are in a metrics row."""
        return replace(self, window=Window())

    def with_best(self, robust_accuracy: float) -> Progress:
        """The same position; this step becomes the best one if it is strictly better."""
        if robust_accuracy <= self.best_robust_accuracy:
            return self
        return replace(self, best_step=self.step, best_robust_accuracy=robust_accuracy)

    def with_good_step(self) -> Progress:
        """The same position; a later rollback returns to this step."""
        return replace(self, good_step=self.step)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> Progress:
        return Progress(**{**values, "window": Window(**values["window"])})
