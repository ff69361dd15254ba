"""What the test of the head's kernels runs in a process of its own, where triton may be imported.

python triton_program.py run IN OUT    both passes over the cases of IN, in Triton's interpreter
python triton_program.py compile       both kernels for an H100; prints the bytes each compiles to
"""

from __future__ import annotations

import json
import sys

import torch


def run(cases: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """The statistics of each case, and the gradient written over its logits or beside them."""
    from megatron_oreal.models.head_triton import gradient, statistics

    found = []
    for case in cases:
        logits = case["logits"]
        out = logits if case["out"].dtype == logits.dtype else case["out"]
        passes = {"statistics": statistics(logits, case["columns"])}
        gradient(logits, case["columns"], case["log_total"], case["slope"], out)
        found.append(passes | {"gradient": out})
    return found


def compiled() -> dict[str, int]:
    """Bytes of machine code, by kernel and precision of the logits."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_oreal.models import head_triton

    integers = {"columns": "*i64", "words": "i32", "stride": "i32"}
    reads = {"found": "*fp32", "tokens": "i32", "floor": "fp32"}
    writes = {"log_total": "*fp32", "slope": "*fp32", "out": "*bf16", "out_stride": "i32"}
    kernels = {"statistics": reads, "gradient": writes}
    sizes = {}
    for name, others in kernels.items():
        kernel = getattr(head_triton, f"_{name}_kernel")
        for precision in ("bf16", "fp32"):
            types = {"logits": f"*{precision}", "BLOCK": "constexpr"} | integers | others
            signature = {argument: types[argument] for argument in kernel.arg_names}
            source = ASTSource(kernel, signature=signature, constexprs={"BLOCK": 4096})
            target = GPUTarget("cuda", 90, 32)
            binary = triton.compile(source, target=target, options={"num_warps": 8})
            sizes[f"{name} {precision}"] = len(binary.asm["cubin"])
    return sizes


if __name__ == "__main__":
    if sys.argv[1] == "compile":
        print(json.dumps(compiled()))  # noqa: T201
    else:
        torch.save(run(torch.load(sys.argv[2], weights_only=True)), sys.argv[3])
