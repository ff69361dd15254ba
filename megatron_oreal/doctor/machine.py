"""What a machine has: GPUs and how they are joined, network cards, limits, shared memory."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
from pathlib import Path

from megatron_oreal.doctor.report import Finding, Level

GIB = 1 << 30
SHARED_MEMORY_BYTES = 8 * GIB  # what NCCL and vLLM's workers exchange through
OPEN_FILES = 65536
_AREA = "machine"
_QUERY = ("--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")
_NEAR = {"PIX", "PXB"}
_COMMAND_TIMEOUT_S = 10.0


def gpu_lines() -> list[str]:
    """Returns `name, MiB, driver` of each GPU, none where there is no driver; not collective."""
    text = _nvidia_smi(*_QUERY)
    return [line.strip() for line in text.splitlines() if line.count(",") == 2]  # noqa: PLR2004


def check_machine(gpus: list[str]) -> list[Finding]:
    """Looks at this machine; not collective.

    Args:
        gpus: What `gpu_lines` returned.
    """
    findings = [_gpus(gpus)]
    if len(gpus) > 1:
        topology = _nvidia_smi("topo", "-m")
        findings += [links(topology), *cards_by_gpu(topology)]
    findings += network_cards(Path("/sys/class/infiniband"), needed=bool(gpus))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    findings.append(
        Finding(_AREA, "CPU", Level.FINE, f"{os.cpu_count()} cores, {memory:.0f} GiB of memory")
    )
    if gpus:
        findings += [_shared_memory(), *_limits()]
    return findings


def _gpus(gpus: list[str]) -> Finding:
    if not gpus:
        return Finding(_AREA, "GPU", Level.FINE, "none", "runs compute on the CPU, over gloo")
    kinds = sorted(set(gpus))
    shown = "; ".join(f"{gpus.count(kind)} x {kind} (MiB, driver)" for kind in kinds)
    if len(kinds) == 1:
        return Finding(_AREA, "GPU", Level.FINE, shown)
    return Finding(_AREA, "GPU", Level.NOTE, shown, "unlike GPUs: the slowest sets the pace")


def links(topology: str) -> Finding:
    """Reads `nvidia-smi topo -m`: whether NVLink joins every pair of GPUs.

    Args:
        topology: Its output; a row a GPU, a cell `NV#` where NVLink joins two.
    """
    rows = [line.split() for line in topology.splitlines() if re.match(r"GPU\d+\s", line)]
    cells = [cell for row in rows for cell in row[1 : len(rows) + 1] if cell != "X"]
    if cells and all(cell.startswith("NV") for cell in cells):
        return Finding(_AREA, "GPU links", Level.FINE, f"NVLink ({cells[0]}) between all pairs")
    others = ", ".join(sorted({cell for cell in cells if not cell.startswith("NV")})) or "unknown"
    says = "tensor parallelism over these links is slow: keep parallel.tensor within NVLink"
    return Finding(_AREA, "GPU links", Level.NOTE, f"not all NVLink: {others}", says)


def cards_by_gpu(topology: str) -> list[Finding]:
    """Reads `nvidia-smi topo -m`: how far each GPU is from the nearest network card.

    `PIX` and `PXB` are within PCIe switches; all else goes through the processor.

    Args:
        topology: Its output; columns and rows `NIC#` for cards, a legend that names them.
    """
    lines = [line.split() for line in topology.splitlines()]
    header = next((line for line in lines if line[:1] == ["GPU0"]), [])
    columns = [i for i, name in enumerate(header) if name.startswith("NIC")]
    rows = [line for line in lines if line and re.fullmatch(r"GPU\d+", line[0]) and line != header]
    if not columns or not rows:
        return []
    far = [row[0] for row in rows if not {row[i + 1] for i in columns if i + 1 < len(row)} & _NEAR]
    if not far:
        found = f"a card of {len(columns)} near each GPU"
        return [Finding(_AREA, "network cards", Level.FINE, found)]
    says = "their traffic crosses the processor: expect half of a card's rate"
    return [Finding(_AREA, "network cards", Level.NOTE, f"none near {', '.join(far)}", says)]


def network_cards(folder: Path, *, needed: bool) -> list[Finding]:
    """Lists InfiniBand or RoCE ports with their state and rate; not collective.

    Args:
        folder: The kernel's `/sys/class/infiniband`.
        needed: Whether their absence is worth a note.
    """
    ports = sorted(folder.glob("*/ports/*")) if folder.is_dir() else []
    if not ports:
        level = Level.NOTE if needed else Level.FINE
        says = "several nodes would talk over TCP" if needed else ""
        return [Finding(_AREA, "InfiniBand", level, "none", says)]
    findings = []
    for port in ports:
        state, rate = (_line(port / name) for name in ("state", "rate"))
        level = Level.FINE if "ACTIVE" in state else Level.NOTE
        says = "" if level is Level.FINE else "NCCL leaves this port out"
        name = f"InfiniBand {port.parts[-3]}:{port.name}"
        findings.append(Finding(_AREA, name, level, f"{state}, {rate}", says))
    return findings


def _line(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return "unreadable"


def _shared_memory() -> Finding:
    size = shutil.disk_usage("/dev/shm").total
    found = f"{size / GIB:.1f} GiB"
    if size >= SHARED_MEMORY_BYTES:
        return Finding(_AREA, "/dev/shm", Level.FINE, found)
    says = "too small for NCCL in a container: --shm-size=16g or --ipc=host"
    return Finding(_AREA, "/dev/shm", Level.NOTE, found, says)


def _limits() -> list[Finding]:
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = locked == resource.RLIM_INFINITY
    memory = Finding(
        _AREA,
        "locked memory",
        Level.FINE if unlimited else Level.NOTE,
        "unlimited" if unlimited else f"{locked >> 10} KiB",
        "" if unlimited else "InfiniBand wants `ulimit -l unlimited`",
    )
    enough = files == resource.RLIM_INFINITY or files >= OPEN_FILES
    opened = Finding(
        _AREA,
        "open files",
        Level.FINE if enough else Level.NOTE,
        str(files),
        "" if enough else f"`ulimit -n {OPEN_FILES}`: sockets of many ranks are files",
    )
    return [memory, opened]


def _nvidia_smi(*arguments: str) -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, *arguments],
            capture_output=True,
            text=True,
            timeout=_COMMAND_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout if done.returncode == 0 else ""
