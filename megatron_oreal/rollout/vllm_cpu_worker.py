"""vLLM's CPU worker with shared memory of its own; vLLM imports it by its name."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from vllm.v1.worker.cpu_worker import CPUWorker

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class NamedCpuWorker(CPUWorker):
    """Names the shared memory of its engine's ranks after `additional_config["engine_name"]`.

    vLLM takes what follows the last colon of the init method for that name. Left at `env://`, two
    runs on one machine meet in one name, and a killed run leaves a name that no later one can take.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        local_rank: int,
        rank: int,
        distributed_init_method: str,
        is_driver_worker: bool = False,
    ) -> None:
        """Takes what vLLM passes, by keyword; the process group is up, so the method only names."""
        config = cast("dict[str, str]", vllm_config.additional_config)
        super().__init__(
            vllm_config,
            local_rank,
            rank,
            f"{distributed_init_method}:{config['engine_name']}",
            is_driver_worker,
        )
