"""Forward passes for `kernels.kernelize`, which gives them to modules that ask for one by name."""

import torch
from torch import Tensor, nn

from padst_kernels import Backend
from padst_kernels.tiles import TileIndex, tile_matmul


class TileLinear(nn.Module):
    """y = W x + b, for a module that holds W as tiles: x `[..., I]` to `[..., O]`.

    Attributes:
        weight: `[G, K, V]`, as `tile_matmul` takes it.
        index: made by `tile_index`.
        out_features: O.
        bias: `[O]`, or None.
    """

    has_backward = True
    can_torch_compile = True

    weight: Tensor
    index: TileIndex
    out_features: int
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        backend: Backend = "triton" if x.is_cuda else "native"
        y = tile_matmul(x, self.weight, self.index, self.out_features, backend=backend)
        return y if self.bias is None else torch.add(y, self.bias)
