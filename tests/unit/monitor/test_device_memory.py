from __future__ import annotations

from megatron_oreal.monitor.device_memory import DeviceMemory

GIB = 1 << 30


def test_the_most_of_each_planned_phase_is_kept_and_compared():
    """Planned 40 and 60 GiB; a phase that comes twice counts by its most."""
    used = iter([30 * GIB, 33 * GIB, 66 * GIB])
    memory = DeviceMemory({"policy": 40 * GIB, "generate": 60 * GIB}, lambda: next(used))
    assert memory.share_of_plan == 0
    for phase in ("policy", "transcripts", "policy"):
        memory.left(phase)
    assert memory.share_of_plan == 33 / 40
    memory.left("generate")
    assert memory.share_of_plan == 1.1
    assert memory.end_iteration() == {"memory/policy_used_gib": 33, "memory/generate_used_gib": 66}
    assert memory.share_of_plan == 0
    assert memory.end_iteration() == {}
