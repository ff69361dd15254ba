"""The learning rate of each model's next step."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_oreal.algorithm.schedule import learning_rate, policy_is_frozen, schedule_index
from megatron_oreal.config.schema import Config


@dataclass
class Rates:
    """Follows the schedule by iterations, or by the updates that each model has made."""

    config: Config
    policy_updates: int = 0
    token_rm_updates: int = 0

    def policy(self, iteration: int) -> float:
        """Returns the policy's rate, 0 while it is frozen."""
        schedule, optimizer = self.config.schedule, self.config.policy_optimizer
        if policy_is_frozen(iteration, schedule):
            return 0.0
        index = schedule_index(iteration, self.policy_updates, schedule)
        return learning_rate(index, optimizer.lr, optimizer.min_lr, schedule)

    def token_rm(self, iteration: int) -> float:
        """Returns the token reward model's rate."""
        schedule, optimizer = self.config.schedule, self.config.token_rm_optimizer
        index = schedule_index(iteration, self.token_rm_updates, schedule)
        return learning_rate(index, optimizer.lr, optimizer.min_lr, schedule)
