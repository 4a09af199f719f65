"""What a whole model computes and reads at least, and how long that takes."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from padst_exp.bench.configurations import Model
from padst_exp.bench.session import Session

# A backward pass multiplies twice for each product of the forward pass: for dX and for dW.
TRAINING = 3


class Work:
    """Operations and weights of a model, by layer.

    Args:
        model: says which layers a scope makes sparse.
        module: the dense model.
        forward: what is done with it, once, to count.
        inputs: of one sample, on the device of `module`.
    """

    def __init__(
        self,
        model: Model,
        module: nn.Module,
        forward: Callable[[nn.Module, Tensor], Tensor],
        inputs: Tensor,
    ) -> None:
        self.model = model
        # Attention is counted as its two products, causal or not, which every device has.
        attention = sdpa_kernel(SDPBackend.MATH)
        with FlopCounterMode(display=False) as counter, attention, torch.no_grad():
            forward(module, inputs)
        counts = counter.get_flop_counts()
        self.operations = sum(counts["Global"].values())
        self.weights = sum(parameter.numel() for parameter in module.parameters())
        root = type(module).__name__
        self.layers = {
            name: (sum(counts.get(f"{root}.{name}", {}).values()), layer.weight.numel())
            for name, layer in module.named_modules()
            if isinstance(getattr(layer, "weight", None), Tensor)
        }

    def floor(
        self, session: Session, batch: int, scope: str, density: float, *, training: bool = False
    ) -> float:
        """Seconds of the operations at the rate of the fastest dense product, or of reading the
        weights, whichever takes longer.

        Args:
            session: measured the ceilings.
            batch: samples.
            scope: which layers are sparse; "" for none.
            density: of those.
            training: a whole step instead of a forward pass.
        """
        patterns = [rule.pattern for rule in self.model.rules(scope)] if scope else []
        sparse = [
            counts
            for name, counts in self.layers.items()
            if any(fnmatchcase(name, pattern) for pattern in patterns)
        ]
        saved = 1 - density
        operations = self.operations - saved * sum(count for count, _ in sparse)
        weights = self.weights - saved * sum(count for _, count in sparse)
        passes = TRAINING if training else 1
        return max(
            passes * batch * operations / session.ceilings.rate,
            passes * weights * session.dtype.itemsize / session.ceilings.bandwidth,
        )
