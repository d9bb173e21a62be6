"""What the last bits of a result on a CPU depend on."""

import torch

from benchmarks.timing import cpuinfo


def arithmetic() -> dict[str, str]:
    """The version of torch, the instructions it uses, and the vendor of the processor, by which its libraries choose
    their kernels: with AVX-512, too, an Intel sums in another order than an AMD."""
    return {
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "vendor": cpuinfo("vendor_id"),
    }
