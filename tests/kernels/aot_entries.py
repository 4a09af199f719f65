"""Like aot.py, for condensed weights: python aot_entries.py 90 bfloat16."""

from __future__ import annotations

import json
import sys

import aot
import torch

from padst_kernels.activations import empty_features
from padst_kernels.entries import kernels


def main(arch: int, dtype: torch.dtype) -> None:
    like = torch.empty(0, dtype=dtype)
    num_entries = 3072 * 768 // 10
    weight = (
        torch.empty(num_entries, dtype=dtype),
        torch.empty(num_entries, dtype=torch.uint16),
        torch.zeros(3073, dtype=torch.int32),
        torch.zeros(3072, dtype=torch.int32),
    )
    for num_tokens in (1, 4, 8, 64):
        x = empty_features(768, num_tokens, like, feature_major=num_tokens > 1)
        with aot.recorded(kernels) as launches:
            kernels.launch_condensed(x, *weight, 3072)
        ((kernel, args, kwargs),) = launches
        counts = aot.compile_launch(kernel, args, kwargs, arch)
        sys.stdout.write(json.dumps({"tokens": num_tokens, **counts}) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), getattr(torch, sys.argv[2]))
