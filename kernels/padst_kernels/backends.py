"""What can multiply."""

from typing import Literal

from padst_kernels.compiled import has_native

# native: C++ compiled for this CPU. torch: plain PyTorch, on any device. triton,
# cuda: kernels of a GPU. scatter: a dense product with a weight that lives only during a pass.
# semi_structured: the same, whose forward product is that of a GPU's sparse tensor cores (2:4).
Backend = Literal["native", "torch", "triton", "cuda", "scatter", "semi_structured"]


def is_here(backend: Backend) -> bool:
    """Whether a backend computes by itself: plain PyTorch stands in for kernels without a compiler.

    Compiles the native kernels at the first use on a machine.
    """
    return backend != "native" or has_native()
