"""What `evaluate` prints of a language model, beside a direct computation."""

import math
import sys
from pathlib import Path

import pytest
import torch

from hostile import trained_run
from padst_exp import evaluate as entry
from padst_exp.engine.distributed import World
from padst_exp.restore import restore

CONTEXT = 16


def test_perplexities_per_token_word_and_byte_are_named_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "Der Bär läuft über die Brücke, and the fox jumps\n\nover  a lazy dog ☃\n" * 40
    (tmp_path / "mine.txt").write_text(text)
    place = [f"dataset.path={tmp_path / 'mine.txt'}", "dataset.vocab_size=280"]
    size = f"dataset.context_length={CONTEXT}"
    run = trained_run(tmp_path, "model=gpt2", "dataset=text_file", *place, size)
    monkeypatch.setattr(sys, "argv", ["padst-evaluate", f"run={run}", "device=cpu"])
    entry.main()
    lines = [line.split() for line in capsys.readouterr().err.splitlines()]
    printed = {line[0]: float(line[1]) for line in lines if line[0].endswith("_perplexity")}

    restored = restore(run, World())
    held_out = text[-len(restored.task.tokenizer.decode(restored.task.validation_tokens)) :]
    tokens = torch.tensor(restored.task.validation_tokens)
    starts = range(0, len(tokens) - 1, CONTEXT)
    nats, model = 0.0, restored.model.double().eval()
    for start in starts:
        # The last block reaches back to be full.
        begin = min(start, len(tokens) - 1 - CONTEXT)
        with torch.no_grad():
            scores = model(tokens[None, begin : begin + CONTEXT])[0].log_softmax(-1)
        picked = scores.gather(1, tokens[begin + 1 : begin + CONTEXT + 1, None])
        nats -= float(picked[start - begin :].sum())
    counts = {
        "token": len(tokens) - 1,
        "word": len(held_out.split()) + held_out.count("\n"),
        "byte": len(held_out.encode()),
    }
    assert printed == {
        f"{unit}_perplexity": pytest.approx(math.exp(nats / count), rel=1e-4)
        for unit, count in counts.items()
    }
