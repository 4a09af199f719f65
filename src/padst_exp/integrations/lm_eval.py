"""Trained language models in lm-evaluation-harness (Gao et al. 2021), as its model `padst`.

`lm_eval --model padst --model_args run=<folder> --tasks ...` finds it by an entry point. Releases
of the harness up to 0.4.13 do not look for any; there `padst-lm-eval`, with the same arguments,
registers it first.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from padst_exp.data.corpora import END_OF_TEXT
from padst_exp.data.task import LanguageModeling, at_least_float32
from padst_exp.engine import distributed
from padst_exp.engine.evaluation import forward_context
from padst_exp.errors import UserError, require
from padst_exp.files import reason
from padst_exp.messages import say
from padst_exp.restore import Restored, restore

NAME = "padst"
MOST_GENERATED = 256
Request = tuple[Any, list[int], list[int]]
"""What the harness calls a request, tokens of a context, tokens of its continuation."""


class PadstLM(TemplateLM):  # type: ignore[misc]
    """A trained language model with the tokenizer of its data set.

    Its likelihoods are those of its evaluation: in the precision of the run, softmax in float32 at
    least. What is longer than its context loses its beginning, and a line says how often.

    An empty context, and the beginning of a text, stands for the end of the text before: GPT-2's
    <|endoftext|>, or a line break where the run's own tokenizer has no such token.

    Args:
        run: run directory, checkpoint or export; or one that is there already.
        batch_size: sequences at a time.
        device: None or a GPU takes the GPU where there is one.
        trust: a package other than ours whose constructors its config may name.
        max_batch_size: unused; the harness always gives it.
        changes: of keys of the run that change no weight, as `dataset.root`.

    Raises:
        UserError: it is no language model of text, or there are several processes.
    """

    def __init__(
        self,
        run: str | Restored,
        batch_size: int | str = 1,
        device: str | None = None,
        trust: str = "",
        max_batch_size: int | None = None,
        **changes: object,
    ) -> None:
        super().__init__()
        number = str(batch_size)
        require(number.isdigit() and number != "0", "batch_size", batch_size, "a number from 1 on")
        self.batch_size = int(batch_size)
        processes = os.environ.get("WORLD_SIZE", "1")
        require(processes == "1", "tasks", f"{processes} processes", "one process")
        if not isinstance(run, Restored):
            world = distributed.start("cpu" if device == "cpu" else "auto")
            overrides = [f"{key}={value}" for key, value in changes.items()]
            run = restore(Path(run), world, trust=[trust] if trust else [], changes=overrides)
        task = run.task
        tokenizer = task.tokenizer if isinstance(task, LanguageModeling) else None
        if tokenizer is None:
            found = f"{run.path}, trained on {type(task).__name__}"
            raise UserError(f"run: expected a language model of text, got {found}")
        self.restored, self.tokens = run, tokenizer
        self.model = run.model.eval()
        self._device = next(self.model.parameters()).device
        self.max_length = task.model_shape["context_length"]
        self._cut = 0
        # Of every task that asked for whole texts: nats and tokens.
        self.rolled: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))

    @property
    def eot_token_id(self) -> int:
        end = self.tokens.token_to_id(END_OF_TEXT)
        return int(self.tokens.encode("\n").ids[0] if end is None else end)

    @property
    def tokenizer_name(self) -> str:
        digest = hashlib.sha256(self.tokens.to_str().encode()).hexdigest()[:16]
        return f"{NAME}-{digest}"

    def get_model_info(self) -> dict[str, str]:
        """What the harness writes beside its results."""
        return {"model_path": str(self.restored.path)}

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **unused: object
    ) -> list[int]:
        return list(self.tokens.encode(string, add_special_tokens=False).ids)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **unused: object
    ) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        # The longest first: what does not fit into memory is known at once.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1] + requests[i][2]))
        self._cut = 0
        starts = range(0, len(order), self.batch_size)
        for start in tqdm(starts, desc="likelihoods", disable=disable_tqdm or len(starts) < 2):
            chosen = order[start : start + self.batch_size]
            scores = self._scores([requests[index][1:] for index in chosen])
            for index, answer in zip(chosen, scores, strict=True):
                answers[index] = answer
        if self._cut:
            say(
                f"{self._cut} of {len(requests)} sequences are longer than the {self.max_length} "
                "tokens of the model's context and lose their beginning"
            )
        return answers

    @torch.no_grad()
    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[float, bool]]:
        """Log-likelihood in nats of each continuation, and whether it is the likeliest one."""
        rows = []
        for context, continuation in pairs:
            found = f"a continuation of {len(continuation)} tokens"
            wanted = f"at most {self.max_length}, the context of the model"
            require(len(continuation) <= self.max_length, "tasks", found, wanted)
            self._cut += len(context) + len(continuation) > self.max_length + 1
            rows.append((context + continuation)[-self.max_length - 1 :])
        # What follows a sequence is nothing to it: attention is causal.
        inputs = torch.zeros(len(rows), max(map(len, rows)) - 1, dtype=torch.int64)
        for number, row in enumerate(rows):
            inputs[number, : len(row) - 1] = torch.tensor(row[:-1])
        logits = self._logits(inputs)
        for number, (row, (_, continuation)) in enumerate(zip(rows, pairs, strict=True)):
            length = len(continuation)
            scores = logits[number, len(row) - 1 - length : len(row) - 1].log_softmax(-1)
            targets = torch.tensor(continuation, dtype=torch.int64, device=scores.device)
            picked = scores.gather(1, targets[:, None])
            yield float(picked.double().sum()), bool((scores.argmax(1) == targets).all())

    def _logits(self, tokens: Tensor) -> Tensor:
        with forward_context(self.restored.trainer.precision, self._device):
            logits = self.model(tokens.to(self._device))
        return at_least_float32(logits)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        windows: list[Request] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm)
        for owner, window, (score, _) in zip(owners, windows, scores, strict=True):
            totals[owner] += score
            name = str(requests[owner].task_name)
            nats, tokens = self.rolled[name]
            self.rolled[name] = nats - score, tokens + len(window[2])
        return totals

    def token_perplexities(self) -> dict[str, float]:
        """Of the tasks that asked for the likelihood of whole texts, per token."""
        return {name: math.exp(nats / tokens) for name, (nats, tokens) in self.rolled.items()}

    @torch.no_grad()
    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        return [
            self._generated(*request.args)
            for request in tqdm(requests, desc="generation", disable=disable_tqdm)
        ]

    def _generated(self, context: str, how: dict[str, Any]) -> str:
        """The likeliest continuation, token by token, up to the first of the stop strings."""
        sampled = bool(how.get("do_sample")) and float(how.get("temperature", 1.0)) > 0
        require(not sampled, "tasks", "do_sample=true", "generation of the likeliest tokens")
        until = how.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        made: list[int] = []
        text = ""
        for _ in range(int(how.get("max_gen_toks", MOST_GENERATED))):
            window = torch.tensor([(tokens + made)[-self.max_length :]])
            token = int(self._logits(window)[0, -1].argmax())
            if token == self.tokens.token_to_id(END_OF_TEXT):
                break
            made.append(token)
            text = self.tokens.decode(made)
            ends = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
            if ends:
                return text[: min(ends)]
        return text


def evaluate_tasks(
    run: Restored,
    tasks: Sequence[str],
    *,
    include_path: str | None,
    limit: int | None,
    batch_size: int,
) -> dict[str, float]:
    """Results of tasks of the harness.

    Args:
        run: a language model.
        tasks: their names; also groups and patterns.
        include_path: a folder with further tasks, as YAML files.
        limit: of the documents of each task; None takes all.
        batch_size: sequences at a time.

    Returns:
        By `task/metric` (`task/metric_stderr`), and for tasks about the likelihood of whole texts
        `task/token_perplexity` beside the harness's word_perplexity and byte_perplexity.

    Raises:
        UserError: there is no such task, or its data cannot be had.
    """
    model = PadstLM(run, batch_size)
    # Every default of a task that its file does not spell out is a warning to it.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        manager = _manager(tasks, include_path)
        names = {pattern: manager.match_tasks([pattern]) for pattern in tasks}
    except Exception as error:  # of YAML, of its own checks: what matters is the line
        raise UserError(
            f"include_path: expected a folder of tasks, got {include_path} ({reason(error)})"
        ) from error
    for pattern, found in names.items():
        require(bool(found), "tasks", pattern, "a task of the harness (`lm_eval ls tasks`)")
    wanted = sorted({name for found in names.values() for name in found})
    try:
        manager.load(wanted)
    except Exception as error:  # of the hub, of datasets
        raise UserError(
            f"tasks: expected tasks whose data are there, got {', '.join(wanted)} ({reason(error)})"
        ) from error
    answer = simple_evaluate(
        model,
        tasks=wanted,
        task_manager=manager,
        limit=limit,
        batch_size=batch_size,
        log_samples=False,
    )
    results: dict[str, float] = {}
    for task, metrics in answer["results"].items():
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if isinstance(value, float) and filtered:
                name = metric if filtered == "none" else f"{metric}:{filtered}"
                results[f"{task}/{name}"] = value
    return results | {
        f"{task}/token_perplexity": value for task, value in model.token_perplexities().items()
    }


def _manager(tasks: Sequence[str], include_path: str | None) -> TaskManager:
    """What knows these tasks, and not the harness's own thousands if none of them is wanted."""
    if include_path is not None:
        own = TaskManager(include_path=include_path, include_defaults=False)
        if all(own.match_tasks([task]) for task in tasks):
            return own
    return TaskManager(include_path=include_path)


def register() -> None:
    """Make `padst` known to a harness that looks for no entry points."""
    if NAME not in model_registry:
        model_registry.register(NAME, target=f"{__name__}:{PadstLM.__name__}")
