from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_empty() -> Iterator[None]:
    """Tensors made by `empty` hold NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
