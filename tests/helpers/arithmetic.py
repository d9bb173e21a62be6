"""What the last bits of a result on a CPU depend on."""

from pathlib import Path

import torch


def arithmetic() -> dict[str, str]:
    """The version of torch, the instructions it uses, and the vendor of the processor, by which its libraries choose
    their kernels: with AVX-512, too, an Intel sums in another order than an AMD."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    vendor = next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "unknown")
    return {
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "vendor": vendor,
    }
