"""Let this process train in fp16 on a CPU, which DeepSpeed and the product refuse."""

from __future__ import annotations

from typing import Any

from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from higgs_ds.training import startup


def allow_fp16() -> None:
    CPU_Accelerator.is_fp16_supported = lambda self: True  # type: ignore[method-assign]
    refused = startup.unsupported

    def unsupported(*arguments: Any) -> list[str]:
        return [problem for problem in refused(*arguments) if not problem.startswith("--precision fp16")]

    startup.unsupported = unsupported
