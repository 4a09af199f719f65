import math

import pytest
import torch
import torch.nn.functional as F

from from_yaml import from_yaml
from padst_exp.data.task import IGNORED, Classification
from padst_exp.errors import UserError


class Images(Classification):
    pass


def images(**options: object) -> Images:
    return Images(image_size=4, channels=3, num_classes=7, **options)  # type: ignore[arg-type]


def test_smoothing_is_spread_over_all_classes() -> None:
    logits, targets = torch.randn(5, 7), torch.randint(7, (5,))
    soft = F.one_hot(targets, 7) * 0.8 + 0.2 / 7
    expected = -(soft * logits.log_softmax(1)).sum(1).mean()
    task = images(smoothing=0.2)
    torch.testing.assert_close(task.loss(logits, targets), expected)
    torch.testing.assert_close(task.loss(logits, soft), expected)


def test_binary_cross_entropy_takes_labels_and_mixtures() -> None:
    logits, targets = torch.randn(5, 7), torch.randint(7, (5,))
    for smoothing in (0.0, 0.1):
        soft = F.one_hot(targets, 7) * (1 - smoothing) + smoothing / 7
        chance = logits.sigmoid()
        expected = -(soft * chance.log() + (1 - soft) * (1 - chance).log()).mean()
        task = images(objective="bce", smoothing=smoothing)
        torch.testing.assert_close(task.loss(logits, targets), expected)
        torch.testing.assert_close(task.loss(logits, soft), expected)


def test_classification_metrics_add_up_over_batches() -> None:
    task = images(smoothing=0.3)
    logits, targets = torch.randn(10, 7), torch.randint(7, (10,))
    parts = [task.metrics(logits[:4], targets[:4]), task.metrics(logits[4:], targets[4:])]
    summary = task.summarize({key: parts[0][key] + parts[1][key] for key in parts[0]})
    hits = (logits.argmax(1) == targets).double().mean().item()
    ranks = (logits > logits.gather(1, targets[:, None])).sum(1)
    assert summary["top1"] == pytest.approx(100 * hits)
    assert summary["top5"] == pytest.approx(100 * (ranks < 5).double().mean().item())
    assert summary["loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    assert parts[0]["count"] == 4


def test_token_loss_and_perplexity_skip_ignored_targets() -> None:
    task = from_yaml("dataset/synthetic_tokens", vocab_size=9, context_length=4)
    logits, targets = torch.randn(3, 4, 9), torch.randint(9, (3, 4))
    targets[0, :3] = IGNORED
    kept = targets != IGNORED
    expected = F.cross_entropy(logits[kept], targets[kept])
    torch.testing.assert_close(task.loss(logits, targets), expected)
    sums = task.metrics(logits, targets)
    assert sums["tokens"] == 9
    assert sums["count"] == 3
    summary = task.summarize(sums)
    assert summary["perplexity"] == pytest.approx(math.exp(expected.item()), rel=1e-5)
    assert "word_perplexity" not in summary


def test_a_diverged_loss_is_an_infinite_perplexity() -> None:
    task = from_yaml("dataset/synthetic_tokens", vocab_size=9, context_length=4)
    assert task.summarize({"nll": 1e9, "tokens": 1, "count": 1})["perplexity"] == math.inf


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_follows_its_seed_and_leaves_its_input_alone(kind: str) -> None:
    task = images(smoothing=0.1, **{kind: 1.0})
    inputs, targets = torch.randn(6, 3, 4, 4), torch.arange(6)
    kept, state = inputs.clone(), torch.get_rng_state()
    one, again, other = (task.augment(inputs, targets, seed) for seed in (5, 5, 6))
    assert torch.equal(inputs, kept)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one[0], again[0])
    assert torch.equal(one[1], again[1])
    assert not torch.equal(one[1], other[1])
    assert one[1].shape == (6, 7)
    torch.testing.assert_close(one[1].sum(1), torch.ones(6))
    assert not torch.equal(one[0], inputs)


def test_no_mixing_is_the_identity() -> None:
    inputs, targets = torch.randn(3, 3, 4, 4), torch.arange(3)
    assert images().augment(inputs, targets, 0) == (inputs, targets)


def test_mixing_an_odd_batch_names_its_key() -> None:
    with pytest.raises(UserError, match=r"trainer\.batch_size"):
        images(mixup=0.8).augment(torch.randn(3, 3, 4, 4), torch.arange(3), 0)


def test_bad_values_name_their_key() -> None:
    for key, value in (("smoothing", 1.0), ("mixup", -0.1), ("cutmix", -1.0)):
        with pytest.raises(UserError, match=rf"^dataset\.{key}: expected .*, got {value}$"):
            images(**{key: value})


def test_synthetic_data_has_its_shapes_and_repeats_its_pool() -> None:
    task = from_yaml(
        "dataset/synthetic_images",
        image_size=6,
        channels=2,
        num_classes=3,
        samples=50,
        validation_samples=9,
        pool=4,
    )
    assert task.model_shape == {"image_size": 6, "channels": 2, "num_classes": 3}
    assert (len(task.train), len(task.validation)) == (50, 9)
    inputs, targets = task.train.__getitems__([(0, 1), (7, 5), (0, 2)])
    assert inputs.shape == (3, 2, 6, 6)
    assert torch.equal(inputs[0], inputs[1])
    assert not torch.equal(inputs[0], inputs[2])
    assert torch.equal(task.validation[1][0], inputs[0])
    assert targets.max() < 3
    again = from_yaml(
        "dataset/synthetic_images", image_size=6, channels=2, num_classes=3, samples=50, pool=4
    )
    assert torch.equal(again.train[(0, 1)][0], inputs[0])

    words = from_yaml(
        "dataset/synthetic_tokens", vocab_size=11, context_length=5, samples=8, pool=8
    )
    inputs, targets = words.train.__getitems__([(0, 3), (0, 4)])
    assert inputs.shape == targets.shape == (2, 5)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_synthetic_sizes_name_their_key() -> None:
    with pytest.raises(UserError, match=r"^dataset\.pool: expected at least 1, got 0$"):
        from_yaml("dataset/synthetic_images", pool=0)
