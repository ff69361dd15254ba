"""Steps refused because of their numbers: counted; too many end the run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from megatron_oreal.config.errors import UserError


class Step(Protocol):
    """What a model's step returns."""

    @property
    def refused(self) -> str:
        """Why no weight was changed; empty after an update."""
        ...


@dataclass
class SkippedSteps:
    """Follows the steps of a run, alike on every rank.

    Attributes:
        most: iterations in a row with a refused step that end the run; iterations without any
            step count neither way.
        in_a_row: how many such iterations there have been before the one under way.
        reasons: why steps were refused in the iteration under way, by the name of the model.
        updated: whether any step of it was taken.
    """

    most: int
    in_a_row: int = 0
    reasons: dict[str, str] = field(default_factory=dict)
    updated: bool = False

    def took(self, model: str, step: Step) -> bool:
        """Notes a step and says whether it changed the model's weights."""
        if step.refused:
            self.reasons[model] = step.refused
            return False
        self.updated = True
        return True

    def end_iteration(self, iteration: int) -> None:
        """Forgets the iteration, unless there were too many like it.

        Raises:
            UserError: This is the last in a row that the config allows.
        """
        reasons, self.reasons = self.reasons, {}
        updated, self.updated = self.updated, False
        if reasons:
            self.in_a_row += 1
        elif updated:
            self.in_a_row = 0
        if reasons and self.in_a_row >= self.most:
            found = " and ".join(f"{model}: {why}" for model, why in reasons.items())
            raise UserError(
                f"engine.max_skipped_steps={self.most}: {self.in_a_row} iterations in a row were"
                f" not trained on, the last is {iteration} ({found}); lower the learning rate,"
                " or replay what was sampled from run.folder/recorded to find out why"
            )
