"""Weights & Biases, offline unless told otherwise; the one file that imports wandb."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from megatron_oreal.config.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from megatron_oreal.monitor.metrics import Kind


class WandbSink:
    """One wandb run in `root/wandb`; offline it opens no connection and never asks to log in.

    A resumed training run goes on in the same wandb run: its id is read off the folders that lie
    there. Metrics are plotted over `iteration`, which, unlike wandb's own step, may go back.

    Args:
        root: the folder of the run.
        mode: `offline` or `online`.
        project: in wandb.
        name: of the run in wandb.
        config: shown with the run.

    Raises:
        UserError: if wandb is not installed, or `online` has no API key.
    """

    def __init__(
        self,
        root: Path,
        mode: Literal["offline", "online"],
        project: str,
        name: str,
        config: dict[str, Any],
    ) -> None:
        wandb = _import_wandb()
        if mode == "online":
            _log_in(wandb)
        self._run = wandb.init(
            mode=mode,
            project=project,
            name=name,
            dir=str(root),
            config=config,
            id=_previous_id(root),
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, disable_code=True, save_code=False
            ),
        )
        self._run.define_metric("*", step_metric="iteration")

    def write(self, iteration: int, metrics: Mapping[str, float], kind: Kind = "train") -> None:
        """Logs the metrics at this iteration."""
        self._run.log({"iteration": iteration, "kind": kind, **metrics})

    def close(self) -> None:
        """Ends the run and waits until it is written."""
        self._run.finish()


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        fix = "wandb is not installed; pip install wandb, or set monitor.wandb=disabled"
        raise UserError(f"monitor.wandb: {fix}") from error
    return wandb


def _log_in(wandb: Any) -> None:
    fix = "set WANDB_API_KEY, run `wandb login`, or set monitor.wandb=offline"
    try:
        known = wandb.login(prompt=False, verify=False)
    except wandb.errors.AuthenticationError as error:
        raise UserError(f"monitor.wandb=online: {str(error).splitlines()[0]}; {fix}") from error
    if not known:
        raise UserError(f"monitor.wandb=online: no API key; {fix}")


def _previous_id(root: Path) -> str | None:
    """Returns the id of the latest wandb run below `root`; folders are `run-<date>_<time>-<id>`."""
    names = [folder.name.partition("run-")[2] for folder in (root / "wandb").glob("*run-*-*")]
    return max(names).partition("-")[2] if names else None
