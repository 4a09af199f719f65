"""Forward passes: precision, and the evaluation of a model on a whole data set."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from padst_exp.data.task import Task
from padst_exp.engine.distributed import World
from padst_exp.engine.settings import Precision


def forward_context(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return the context of a forward pass: bfloat16 autocast, or nothing."""
    if precision == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def to_device(
    batch: tuple[Tensor, Tensor], device: torch.device, precision: Precision
) -> tuple[Tensor, Tensor]:
    """Move a batch to `device`; floating-point inputs and targets become as wide as weights."""
    wide = torch.float64 if precision == "float64" else torch.float32
    inputs, targets = (
        tensor.to(device, wide if tensor.is_floating_point() else tensor.dtype, non_blocking=True)
        for tensor in batch
    )
    return inputs, targets


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Task,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    precision: Precision,
    world: World,
    outcomes: list[Tensor] | None = None,
) -> dict[str, float]:
    """Return the metrics of `model` over all `batches` of all ranks.

    Args:
        model: on the device of `world`; evaluated in eval mode and left as it was.
        task: defines the metrics.
        batches: this rank's share, on the host; possibly none.
        precision: of the forward pass.
        world: the ranks whose sums are added up.
        outcomes: to be filled with what the task says of this rank's samples, in order.

    Raises:
        Exception: what a batch or the model raised on this rank; what another rank met comes as a
            `UserError`. The model is left as it was.
    """
    training = model.training
    model.eval()
    sums: dict[str, Tensor] = {}
    error: Exception | None = None
    try:
        for batch in batches:
            inputs, targets = to_device(batch, world.device, precision)
            with forward_context(precision, world.device):
                logits = model(inputs)
            for name, value in task.metrics(logits, targets).items():
                sums[name] = sums[name] + value if name in sums else value
            each = None if outcomes is None else task.outcomes(logits, targets)
            if outcomes is not None and each is not None:
                outcomes.append(each.cpu())
    except Exception as failure:
        error = failure
    finally:
        model.train(training)
    world.agree(error)
    # A rank without any batch does not know the names.
    names = world.from_main(list(sums))
    zero = torch.zeros((), dtype=torch.float64, device=world.device)
    totals = [sums.get(name, zero).to(torch.float64).clone() for name in names]
    world.sum_(totals)
    return task.summarize({name: float(total) for name, total in zip(names, totals, strict=True)})
