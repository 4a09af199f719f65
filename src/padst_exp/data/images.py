"""Image sets that fit in memory: a whole batch is a few tensor operations."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from padst_exp.data.fingerprint import fingerprint
from padst_exp.data.task import Address, Batch
from padst_exp.seeds import mixed


class TensorImages(Dataset[Batch]):
    """Images addressed by index, normalised as (pixel - mean) / std when drawn.

    Args:
        images: `[N, C, H, W]`, uint8.
        labels: `[N]`, int64.
        mean, std: per channel, in the units of `images`.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.images, self.labels = images, labels
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.scale = 1 / torch.tensor(std).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Batch:
        inputs, targets = self.__getitems__([index])
        return inputs[0], targets[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        rows = torch.tensor(indices)
        return self.normalised(self.images[rows]), self.labels[rows]

    def fingerprint(self) -> str:
        """Of pixels and labels."""
        return fingerprint(self.images, self.labels)

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 `[N, C, H, W]` -> float32."""
        return (images - self.mean) * self.scale


class AugmentedImages(Dataset[Batch]):
    """Training images addressed by (epoch, index), shifted and mirrored at random.

    Args:
        shift: greatest shift in pixels, in both directions of both axes; zeros move in.
        flip: whether to mirror half of the images, left to right.
    """

    def __init__(self, source: TensorImages, *, shift: int, flip: bool) -> None:
        self.source = source
        self.seed = 0
        self.shape = source.images.shape[1:]
        height, width = self.shape[1:]
        padded = torch.nn.functional.pad(source.images, [shift] * 4)
        self.pixels = padded.flatten()
        self.pixels_per_image = padded[0].numel()
        # Every placement of the window, as offsets into a padded image: a batch is one gather.
        offsets = torch.arange(self.pixels_per_image).view(padded.shape[1:])
        windows = [
            offsets[:, down : down + height, right : right + width]
            for down in range(2 * shift + 1)
            for right in range(2 * shift + 1)
        ]
        if flip:
            windows += [window.flip(2) for window in windows]
        self.windows = torch.stack(windows).flatten(1)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, address: Address) -> Batch:
        inputs, targets = self.__getitems__([address])
        return inputs[0], targets[0]

    def __getitems__(self, addresses: Sequence[Address]) -> Batch:
        epochs, indices = np.array(addresses, np.int64).T
        rows = torch.from_numpy(indices)
        if len(self.windows) == 1:
            images = self.source.images[rows]
        else:
            bits = mixed(self.seed, epochs.astype(np.uint64), indices.astype(np.uint64))
            chosen = torch.from_numpy((bits % np.uint64(len(self.windows))).astype(np.int64))
            pixels = self.windows[chosen] + (rows * self.pixels_per_image)[:, None]
            images = self.pixels.take(pixels).view(-1, *self.shape)
        return self.source.normalised(images), self.source.labels[rows]

    def fingerprint(self) -> str:
        """Of pixels and labels."""
        return self.source.fingerprint()
