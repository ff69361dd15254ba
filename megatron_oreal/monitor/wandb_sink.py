"""Weights & Biases, offline unless told otherwise; the one file that imports wandb."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from megatron_oreal.config.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from megatron_oreal.monitor.metrics import Kind

# Of the table of rollouts, as a line of a transcript file names them.
COLUMNS = (
    *("iteration", "prompt_id", "sample", "prompt", "response", "gold_answer", "extracted"),
    *("outcome", "reason", "pass_rate", "advantage", "response_length", "score", "trained"),
)


class WandbSink:
    """One wandb run in `root/wandb`; offline it opens no connection and never asks to log in.

    A resumed training run goes on in the same wandb run. Metrics are plotted over `iteration`,
    which, unlike wandb's own step, may go back.

    Args:
        root: the folder of the run.
        mode: `offline` or `online`.
        project: in wandb.
        name: of the run in wandb.
        config: shown with the run.
        run_id: of the run to go on with; empty to read it off the folders that lie there.

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
        *,
        run_id: str = "",
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
            id=run_id or _previous_id(root),
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, disable_code=True, save_code=False
            ),
        )
        self._run.define_metric("*", step_metric="iteration")

    @property
    def id(self) -> str:
        """The id of the run."""
        return self._run.id

    def write(self, iteration: int, metrics: Mapping[str, float], kind: Kind = "train") -> None:
        """Logs the metrics at this iteration."""
        self._run.log({"iteration": iteration, "kind": kind, **metrics})

    def show(self, iteration: int, rollouts: Sequence[Mapping[str, Any]], page: str) -> None:
        """Logs a table of rollouts, lines of a transcript file, and a page of their tokens."""
        wandb = _import_wandb()
        rows = [[line[column] for column in COLUMNS] for line in rollouts]
        table = wandb.Table(columns=list(COLUMNS), data=rows, allow_mixed_types=True)
        html = wandb.Html(page, inject=False, data_is_not_path=True)
        self._run.log({"iteration": iteration, "rollouts": table, "tokens": html})

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
