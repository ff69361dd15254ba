"""A real offline wandb run, in a process of its own as wandb keeps a service running beside it."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

OFFLINE = """
import math, socket, sys
from pathlib import Path
from megatron_oreal.monitor.wandb_sink import COLUMNS, WandbSink

def refuse(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost", "::1"):
        raise AssertionError(f"connects to {address}")
    return connect(self, address)

connect, socket.socket.connect = socket.socket.connect, refuse
for first in (0, 1):
    sink = WandbSink(Path(sys.argv[1]), "offline", "project", "name", {"run": {"seed": 3}})
    sink.write(first, {"oreal/loss": 0.5, "oreal/kl_k3": math.nan})
    sink.write(first, {"eval/greedy": 0.25}, "eval")
    sink.show(first, [dict.fromkeys(COLUMNS) | {"response": "<b>x", "score": 0.5}], "<p>tokens</p>")
    sink.close()
"""

ONLINE = """
import sys
from pathlib import Path
from megatron_oreal.config.errors import UserError
from megatron_oreal.monitor.wandb_sink import WandbSink

try:
    WandbSink(Path(sys.argv[1]), "online", "project", "name", {})
except UserError as error:
    sys.exit(str(error))
"""


def run(script: str, root: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    env = kept | {"HOME": str(root / "home"), "NETRC": str(root / "netrc")} | extra
    # wandb keeps a temporary folder of media until the process ends.
    media = "ignore:Implicitly cleaning up:ResourceWarning"
    command = [sys.executable, "-W", "error", "-W", media, "-c", script, str(root)]
    return subprocess.run(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_offline_writes_into_the_run_folder_and_resumes_the_same_run(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    done = run(OFFLINE, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1
    for file in files:
        content = file.read_bytes()
        assert b"oreal/loss" in content
        assert b"eval/greedy" in content
        assert b"seed" in content
        assert b"html-file" in content
    pages = list((tmp_path / "wandb").rglob("media/html/*.html"))
    assert {page.read_text() for page in pages} == {"<p>tokens</p>"}
    tables = list((tmp_path / "wandb").rglob("media/table/*.json"))
    assert "<b>x" in tables[0].read_text()


def test_online_without_a_key_ends_with_one_line_and_no_question(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    done = run(ONLINE, tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "monitor.wandb=online: no API key; set WANDB_API_KEY, run `wandb login`, "
        "or set monitor.wandb=offline"
    )
    done = run(ONLINE, tmp_path, WANDB_API_KEY="too short")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("monitor.wandb=online: WANDB_API_KEY invalid: ")
