"""What a training loop needs to know of a data set: samples, loss, metrics and their summary."""

import abc
import math
from collections.abc import Mapping, Sized
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from padst_exp.data.fingerprint import fingerprint
from padst_exp.errors import require

Batch = tuple[Tensor, Tensor]
"""(inputs, targets)."""

Address = tuple[int, int]
"""(epoch, index) of a training sample."""

IGNORED = -100
"""Target of a position that counts in no loss and no metric."""


class Task(abc.ABC):
    """A data set with its loss and metrics.

    Attributes:
        gives: names of what the data set fixes for every model it can feed.
        model_shape: these, as keyword arguments of the model.
        items_per_sample: images (1) or tokens per sample, the unit of throughput.
        monitor: name of the summary entry to watch, and whether more or less is better.
        repeats: times each drawn training sample enters a batch (repeated augmentation).
        train: map-style, addressed by (epoch, index). Augmentation is a function of
            (train.seed, epoch, index) alone. The loader sets `seed` on a copy of its own. Or a
            `TextStream`.
        validation: map-style, addressed by index.
        for_training: False for data that models are only tested on.
    """

    kind: ClassVar[Literal["classification", "language_modeling"]]
    gives: ClassVar[tuple[str, ...]] = ()
    monitor: ClassVar[tuple[str, Literal["min", "max"]]]
    model_shape: dict[str, int]
    items_per_sample: int
    repeats: int = 1
    for_training: bool = True
    train: Any
    validation: Any

    def augment(self, inputs: Tensor, targets: Tensor, seed: int) -> Batch:
        """Augments a training batch on its device, reproducibly from `seed`. Identity here."""
        return inputs, targets

    def require_micro_batch(self, size: int) -> None:
        """Raise a `UserError` unless `augment` can take so many samples. Any number here."""

    def baselines(self) -> dict[str, float]:
        """Figures of simple models on the validation split, to compare with; may be empty."""
        return {}

    def describe(self) -> dict[str, int | str]:
        """What the data are, wherever they lie: a run goes on with the same, on every rank.

        Returns:
            The samples of both splits but a stream, and a hash of their `fingerprint`s, which a
            split without one leaves out.
        """
        splits = {"training": self.train, "validation": self.validation}
        prints = [split.fingerprint() for split in splits.values() if hasattr(split, "fingerprint")]
        counts: dict[str, int | str] = {
            name: len(split) for name, split in splits.items() if isinstance(split, Sized)
        }
        return counts | {"fingerprint": fingerprint(*prints)}

    @property
    def samples(self) -> int | None:
        """How many there are for training; None of a stream."""
        return len(self.train) if isinstance(self.train, Sized) else None

    @abc.abstractmethod
    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Training loss, a scalar mean over the batch."""

    @abc.abstractmethod
    def metrics(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Float64 scalar sums, "count" (samples) among them, to be added up over batches, ranks."""

    def outcomes(self, logits: Tensor, targets: Tensor) -> Tensor | None:
        """What each sample has to do with the monitored metric, to compare models sample by sample.

        Returns:
            Float64 `[B, 2]`: the metric is a function of the sum of the first column over that of
            the second. None where it is nothing of the kind.
        """
        return None

    @abc.abstractmethod
    def summarize(self, sums: Mapping[str, Tensor | float]) -> dict[str, float]:
        """Means and derived figures of the sums that `metrics` gave."""


class Classification(Task):
    """Single-label image classification.

    Args:
        image_size: height and width of an image, in pixels.
        channels: channels of an image.
        num_classes: number of classes.
        smoothing: label smoothing of the training loss.
        objective: softmax cross-entropy, or the binary cross-entropy per class, averaged over
            classes, of DeiT III and ResNet strikes back.
        mixup, cutmix: alpha of each, 0 for off; with both, one is drawn for each batch (timm).

    Attributes:
        preprocessing: what becomes of a validation image, by timm's names, where it is known:
            mean and std (of pixels in [0, 1]), interpolation, crop_pct.
    """

    kind = "classification"
    gives = ("image_size", "channels", "num_classes")
    monitor = ("top1", "max")
    items_per_sample = 1
    preprocessing: Mapping[str, object] = {}

    def __init__(
        self,
        *,
        image_size: int,
        channels: int,
        num_classes: int,
        smoothing: float = 0.0,
        objective: Literal["cross_entropy", "bce"] = "cross_entropy",
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ) -> None:
        require(image_size >= 1, "dataset.image_size", image_size, "at least 1 pixel")
        require(num_classes >= 2, "dataset.num_classes", num_classes, "at least 2")
        require(0 <= smoothing < 1, "dataset.smoothing", smoothing, "a number in [0, 1)")
        for key, value in (("mixup", mixup), ("cutmix", cutmix)):
            require(value >= 0, f"dataset.{key}", value, "a positive alpha, or 0 for off")
        self.model_shape = {
            "image_size": image_size,
            "channels": channels,
            "num_classes": num_classes,
        }
        self.smoothing = smoothing
        self.objective = objective
        self.mixup, self.cutmix = mixup, cutmix

    def augment(self, inputs: Tensor, targets: Tensor, seed: int) -> Batch:
        """Mixup or cutmix: `[B, C, H, W]`, int64 `[B]` -> the same, float `[B, num_classes]`.

        Raises:
            UserError: the micro-batch of this rank is odd (each image is mixed with a partner).
        """
        self.require_micro_batch(len(inputs))
        if self.mixup == self.cutmix == 0:
            return inputs, targets
        from timm.data.mixup import Mixup

        from padst_exp.seeds import preserved_rng

        mix = Mixup(
            mixup_alpha=self.mixup,
            cutmix_alpha=self.cutmix,
            label_smoothing=self.smoothing,
            num_classes=self.model_shape["num_classes"],
        )
        with preserved_rng(seed):
            # timm mixes in place.
            return mix(inputs.clone(), targets)

    def require_micro_batch(self, size: int) -> None:
        """Raise a `UserError` for an odd one where each image is mixed with a partner."""
        mixed = self.mixup > 0 or self.cutmix > 0
        found = f"{size} images in a micro-batch of one process"
        wanted = "an even number for dataset.mixup and dataset.cutmix"
        require(not mixed or size % 2 == 0, "trainer.batch_size", found, wanted)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits `[B, K]`, targets int64 `[B]` (smoothed here) or mixed `[B, K]` -> scalar."""
        logits = at_least_float32(logits)
        if self.objective == "cross_entropy":
            smoothing = self.smoothing if targets.ndim == 1 else 0.0
            return F.cross_entropy(logits, targets, label_smoothing=smoothing)
        if targets.ndim == 1:
            hot = F.one_hot(targets, logits.shape[1]).to(logits)
            targets = hot * (1 - self.smoothing) + self.smoothing / logits.shape[1]
        return F.binary_cross_entropy_with_logits(logits, targets)

    def metrics(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Sums of the plain cross-entropy (no smoothing), top-1 and top-5 hits, and samples.

        Mixed targets `[B, K]` count as their largest class in the hits.
        """
        logits = at_least_float32(logits)
        loss = F.cross_entropy(logits, targets, reduction="none")
        ranked = _ranked(logits, targets)
        return {
            "loss": loss.double().sum(),
            "top1": ranked[:, 0].double().sum(),
            "top5": ranked.double().sum(),
            "count": torch.tensor(len(logits), dtype=torch.float64, device=logits.device),
        }

    def outcomes(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Whether the best class of each image is right, and 1: float64 `[B, 2]`."""
        right = _ranked(at_least_float32(logits), targets)[:, 0]
        return torch.stack([right, torch.ones_like(right)], dim=1).double()

    def summarize(self, sums: Mapping[str, Tensor | float]) -> dict[str, float]:
        """Mean "loss" in nats, "top1" and "top5" in percent."""
        count = float(sums["count"])
        return {
            "loss": float(sums["loss"]) / count,
            "top1": 100 * float(sums["top1"]) / count,
            "top5": 100 * float(sums["top5"]) / count,
        }


def _ranked(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether each of the best five classes, or of all, is the right one: bool `[B, 5]`."""
    labels = targets if targets.ndim == 1 else targets.argmax(1)
    return logits.topk(min(5, logits.shape[1])).indices == labels[:, None]


class LanguageModeling(Task):
    """Next-token prediction on packed text.

    Args:
        vocab_size: number of token ids.
        context_length: tokens of one sample.

    Attributes:
        words: of the validation text, separated by white space, ends of lines among them; turns
            the token losses into a perplexity per word. None where they are not counted.
        bytes: of the validation text in UTF-8; the same for a perplexity per byte.
        tokenizer: that made the tokens; None where they stand for no text.

    Raises:
        UserError: a size is below 1.
    """

    kind = "language_modeling"
    gives = ("vocab_size", "context_length")
    monitor = ("perplexity", "min")
    words: int | None = None
    bytes: int | None = None
    tokenizer: Tokenizer | None = None

    def __init__(self, *, vocab_size: int, context_length: int) -> None:
        require(vocab_size >= 1, "dataset.vocab_size", vocab_size, "at least 1")
        require(context_length >= 1, "dataset.context_length", context_length, "at least 1")
        self.model_shape = {"vocab_size": vocab_size, "context_length": context_length}
        self.items_per_sample = context_length

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits `[B, T, V]`, targets int64 `[B, T]` (`IGNORED` skipped) -> mean nats a token."""
        return F.cross_entropy(
            at_least_float32(logits.flatten(0, 1)), targets.flatten(), ignore_index=IGNORED
        )

    def metrics(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Sums of the negative log-likelihood in nats, of scored tokens, and of samples."""
        nll, tokens = self.outcomes(logits, targets).sum(0)
        return {
            "nll": nll,
            "tokens": tokens,
            "count": torch.tensor(len(targets), dtype=torch.float64, device=targets.device),
        }

    def outcomes(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood in nats and scored tokens of each text: float64 `[B, 2]`."""
        nll = F.cross_entropy(
            at_least_float32(logits.flatten(0, 1)),
            targets.flatten(),
            ignore_index=IGNORED,
            reduction="none",
        )
        scored = targets != IGNORED
        return torch.stack([nll.view_as(targets).double().sum(1), scored.double().sum(1)], dim=1)

    def summarize(self, sums: Mapping[str, Tensor | float]) -> dict[str, float]:
        """Mean "loss" in nats per token, "perplexity" per token and, if known, per word, byte."""
        loss = float(sums["nll"]) / float(sums["tokens"])
        summary = {"loss": loss, "perplexity": _exp(loss)}
        for unit, count in (("word", self.words), ("byte", self.bytes)):
            if count is not None:
                # All losses over all words: no token without a target is given the mean loss.
                summary[f"{unit}_perplexity"] = _exp(float(sums["nll"]) / count)
        return summary


def _exp(nats: float) -> float:
    # A diverged run must report infinity, not stop with an OverflowError.
    return math.exp(nats) if nats < 700 else math.inf


def at_least_float32(logits: Tensor) -> Tensor:
    """Widen half precision before a softmax, and leave float64 as it is."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
