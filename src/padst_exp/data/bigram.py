"""A strong count-based language model of one token of memory, to measure others against."""

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]


class Bigram:
    """Interpolated Kneser-Ney bigrams (Ney, Essen and Kneser 1994; Chen and Goodman 1999).

    p(w | v) = max(c(v, w) - D, 0) / c(v) + D * N(v, .) / c(v) * q(w), where N counts distinct
    successors and q is proportional to the number of distinct predecessors of w, itself discounted
    in favour of the uniform distribution, so that no token has probability zero. Each discount is
    n1 / (n1 + 2 n2) of the counts it applies to, as estimated by leaving one out.

    Args:
        tokens: training text, `[N]`.
        vocab_size: number of token ids.
    """

    def __init__(self, tokens: Ids, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        tokens = tokens.astype(np.int64)
        self.pairs, self.counts = np.unique(
            tokens[:-1] * vocab_size + tokens[1:], return_counts=True
        )
        first, second = np.divmod(self.pairs, vocab_size)
        self.discount = _discount(self.counts)
        self.totals = np.bincount(first, self.counts, vocab_size)
        self.successors = np.bincount(first, minlength=vocab_size)
        predecessors = np.bincount(second, minlength=vocab_size)
        discount = _discount(predecessors[predecessors > 0])
        kept = np.maximum(predecessors - discount, 0)
        freed = predecessors.sum() - kept.sum()
        self.continuation = (kept + freed / vocab_size) / predecessors.sum()

    def probabilities(self, previous: Ids, following: Ids) -> Floats:
        """p(following | previous), elementwise."""
        wanted = previous.astype(np.int64) * self.vocab_size + following
        places = np.minimum(np.searchsorted(self.pairs, wanted), len(self.pairs) - 1)
        counts = np.where(self.pairs[places] == wanted, self.counts[places], 0)
        totals = self.totals[previous]
        seen = np.maximum(totals, 1)
        # What an unseen context frees is everything.
        freed = np.where(totals > 0, self.discount * self.successors[previous] / seen, 1.0)
        return np.maximum(counts - self.discount, 0) / seen + freed * self.continuation[following]

    def perplexity(self, tokens: Ids) -> float:
        """exp of the mean negative log-likelihood of all tokens but the first, `[N]`."""
        probabilities = self.probabilities(tokens[:-1], tokens[1:])
        return float(np.exp(-np.log(probabilities).mean()))


def _discount(counts: NDArray[np.integer]) -> float:
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    # A text too small or too regular to tell gets the usual middle of the range.
    return once / (once + 2 * twice) if once else 0.5
