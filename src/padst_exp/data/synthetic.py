"""Random inputs of any shape, to measure speed: no file, no decoding, nothing to learn."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from padst_exp.data.fingerprint import fingerprint
from padst_exp.data.task import Address, Batch, Classification, LanguageModeling
from padst_exp.errors import require
from padst_exp.memory import require_memory


class Pool(Dataset[Batch]):
    """`samples` samples, of which number i is entry i modulo the size of a pool.

    Addressed by index, or by (epoch, index).

    Args:
        inputs, targets: the pool, `[P, ...]` each.
    """

    seed = 0

    def __init__(self, inputs: Tensor, targets: Tensor, samples: int) -> None:
        self.inputs, self.targets, self.samples = inputs, targets, samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, address: Address | int) -> Batch:
        inputs, targets = self.__getitems__([address])
        return inputs[0], targets[0]

    def __getitems__(self, addresses: Sequence[Address | int]) -> Batch:
        indices = [item if isinstance(item, int) else item[1] for item in addresses]
        rows = torch.tensor(indices) % len(self.inputs)
        return self.inputs[rows], self.targets[rows]

    def fingerprint(self) -> str:
        """Of the pool."""
        return fingerprint(self.inputs, self.targets)


class SyntheticImages(Classification):
    """Normal noise with random labels.

    Args:
        samples, validation_samples: apparent sizes of the two splits.
        pool: images really held, 600 kB each at 224 pixels.
        seed: of the noise, the same on every device.
    """

    def __init__(
        self,
        *,
        image_size: int,
        channels: int,
        num_classes: int,
        samples: int,
        validation_samples: int,
        pool: int,
        seed: int,
    ) -> None:
        super().__init__(image_size=image_size, channels=channels, num_classes=num_classes)
        _require_positive(
            channels=channels, samples=samples, validation_samples=validation_samples, pool=pool
        )
        require_memory("dataset.pool", pool, 4.0 * pool * channels * image_size**2)
        generator = torch.Generator().manual_seed(_require_seed(seed))
        inputs = torch.randn(pool, channels, image_size, image_size, generator=generator)
        targets = torch.randint(num_classes, (pool,), generator=generator)
        self.train = Pool(inputs, targets, samples)
        self.validation = Pool(inputs, targets, validation_samples)


class SyntheticTokens(LanguageModeling):
    """Independent uniform tokens: the best possible perplexity is `vocab_size`.

    Args:
        samples, validation_samples: apparent sizes of the two splits.
        pool: sequences really held.
        seed: of the tokens, the same on every device.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        context_length: int,
        samples: int,
        validation_samples: int,
        pool: int,
        seed: int,
    ) -> None:
        _require_positive(
            vocab_size=vocab_size,
            context_length=context_length,
            samples=samples,
            validation_samples=validation_samples,
            pool=pool,
        )
        super().__init__(vocab_size=vocab_size, context_length=context_length)
        require_memory("dataset.pool", pool, 8.0 * pool * (context_length + 1))
        generator = torch.Generator().manual_seed(_require_seed(seed))
        tokens = torch.randint(vocab_size, (pool, context_length + 1), generator=generator)
        self.train = Pool(tokens[:, :-1], tokens[:, 1:], samples)
        self.validation = Pool(tokens[:, :-1], tokens[:, 1:], validation_samples)


def _require_seed(seed: int) -> int:
    """The seed, checked."""
    require(0 <= seed < 2**63, "dataset.seed", seed, "an integer from 0 to 2^63 - 1")
    return seed


def _require_positive(**sizes: int) -> None:
    for key, value in sizes.items():
        require(value >= 1, f"dataset.{key}", value, "at least 1")
