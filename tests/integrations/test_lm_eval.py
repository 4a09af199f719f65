"""Language models of ours in lm-evaluation-harness itself, on tasks and data made here."""

import json
import math
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from from_yaml import asked
from hostile import trained_run
from padst_exp.engine.distributed import World
from padst_exp.errors import UserError
from padst_exp.evaluate import EvaluateSchema, downstream
from padst_exp.restore import Restored, restore

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow  # the harness takes seconds to import

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model, model_registry  # noqa: E402

from padst_exp.integrations.lm_eval import PadstLM, register  # noqa: E402

WORDS = "The quick brown fox jumps over a lazy dog and it barks at all of them.\n"
CONTEXT = 16
TASKS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": " {{choices[answer]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")
        ],
    },
    "written": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}
DOCS = [
    {
        "question": f"{' '.join(WORDS.split()[: 3 + i])}",
        "choices": ["dog", "lazy fox", "cow jumps"][: 2 + i % 2],
        "answer": i % 2,
        "text": " ".join(WORDS.split()[i:]) + "\nÄ second line of it" * i,
    }
    for i in range(7)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and a folder of tasks."""
    folder = tmp_path_factory.mktemp("lm")
    (folder / "mine.txt").write_text(WORDS * 60)
    data = ["dataset=text_file", f"dataset.path={folder / 'mine.txt'}", "dataset.vocab_size=280"]
    trained_run(folder, "model=gpt2", *data, f"dataset.context_length={CONTEXT}")
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    for name, task in TASKS.items():
        where = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}},
            "test_split": "test",
        }
        text = yaml.safe_dump({"task": name, **where, **task})
        (folder / "tasks").mkdir(exist_ok=True)
        (folder / "tasks" / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Restored:
    return restore(folder / "run", World())


def keys(folder: Path, **changes: Any) -> EvaluateSchema:
    given: dict[str, Any] = {"batch_size": 3, "device": "cpu", "tasks": tuple(TASKS)}
    places = {"run": str(folder / "run"), "include_path": str(folder / "tasks")}
    return asked("evaluate", EvaluateSchema, **{**given, **places, **changes})


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, float]:
    return downstream(keys(folder), World())[1]


def encoded(run: Restored, text: str) -> list[int]:
    ids: list[int] = run.task.tokenizer.encode(text).ids  # type: ignore[attr-defined]
    return ids


def nats(run: Restored, context: list[int], continuation: list[int]) -> Tensor:
    """Of each token of a continuation, one forward pass for each, without padding or batches."""
    scores = []
    context = context[-(CONTEXT + 1 - len(continuation)) :]
    for place, token in enumerate(continuation):
        seen = context + continuation[:place]
        with torch.no_grad():
            logits = run.model(torch.tensor([seen]))[0, -1].double()
        scores.append(-logits.log_softmax(0)[token])
    return torch.stack(scores)


def chosen(run: Restored, doc: dict[str, Any], normalised: bool) -> int:
    """Which of the choices is the likeliest one."""
    scores = []
    for choice in doc["choices"]:
        context, whole = encoded(run, doc["question"]), encoded(run, f"{doc['question']} {choice}")
        score = -float(nats(run, context, whole[len(context) :]).sum())
        scores.append(score / (len(choice) if normalised else 1))
    return max(range(len(scores)), key=scores.__getitem__)


def test_choices_and_last_words_equal_brute_force(results: dict[str, float], run: Restored) -> None:
    for metric, normalised in (("acc", False), ("acc_norm", True)):
        hits = [chosen(run, doc, normalised) == doc["answer"] for doc in DOCS]
        assert results[f"choices/{metric}"] == pytest.approx(sum(hits) / len(hits))
    losses = []
    for doc in DOCS:
        context = encoded(run, doc["question"])
        whole = encoded(run, f"{doc['question']} {doc['choices'][doc['answer']]}")
        losses.append(float(nats(run, context, whole[len(context) :]).sum()))
    mean = sum(losses) / len(losses)
    assert results["last_word/perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)


def test_perplexities_of_texts_are_per_word_byte_and_token(
    results: dict[str, float], run: Restored
) -> None:
    total = tokens = 0.0
    (start,) = encoded(run, "\n")
    for doc in DOCS:
        ids = encoded(run, doc["text"])
        # Windows do not overlap but for the one token that the next begins with, and the last one
        # reaches back to be full.
        for first in range(0, len(ids), CONTEXT):
            part = ids[first : first + CONTEXT]
            before = [start, *ids[:first]][-(CONTEXT - len(part) + 1) :]
            total += float(nats(run, before, part).sum())
        tokens += len(ids)
    words = sum(len(doc["text"].split()) for doc in DOCS)
    size = sum(len(doc["text"].encode()) for doc in DOCS)
    for unit, count in (("word", words), ("byte", size), ("token", tokens)):
        near = pytest.approx(math.exp(total / count), rel=1e-4)
        assert results[f"texts/{unit}_perplexity"] == near
    assert results["texts/bits_per_byte"] == pytest.approx(total / size / math.log(2), rel=1e-4)


def test_a_long_context_loses_its_beginning_and_a_line_says_so(
    run: Restored, capsys: pytest.CaptureFixture[str]
) -> None:
    context, continuation = WORDS * 3, " dog"
    request = Instance("loglikelihood", {}, (context, continuation), 0)
    ((score, greedy),) = PadstLM(run).loglikelihood([request])
    ids, whole = encoded(run, context.rstrip()), encoded(run, context + continuation)
    losses = nats(run, ids, whole[len(ids) :])
    assert score == pytest.approx(-float(losses.sum()), rel=1e-4) and not greedy
    assert "1 of 1 sequences are longer than the 16 tokens" in capsys.readouterr().err
    with pytest.raises(UserError, match="expected at most 16, the context of the model, got a"):
        PadstLM(run).loglikelihood([Instance("loglikelihood", {}, ("a", WORDS * 3), 0)])


def test_what_is_generated_is_the_likeliest(results: dict[str, float], run: Restored) -> None:
    assert 0 <= results["written/exact_match"] <= 1
    model = PadstLM(run)
    made = model._generated("The quick", {"max_gen_toks": 4})
    ids = encoded(run, "The quick")
    for _ in range(4):
        with torch.no_grad():
            ids.append(int(run.model(torch.tensor([ids[-CONTEXT:]]))[0, -1].argmax()))
    text = run.task.tokenizer.decode(ids[-4:])  # type: ignore[attr-defined]
    assert made == text and len(made) > 1
    assert model._generated("The quick", {"max_gen_toks": 4, "until": [text[1]]}) == text[:1]
    with pytest.raises(UserError, match="expected generation of the likeliest tokens"):
        model._generated("The quick", {"do_sample": True})


def test_the_harness_finds_it_by_name(folder: Path) -> None:
    register()
    register()
    assert get_model("padst") is PadstLM
    # As newer harnesses do with what is declared in pyproject.toml.
    declared = EntryPoint("other", "padst_exp.integrations.lm_eval:PadstLM", "lm_eval.models")
    model_registry.register("by_entry_point", target=declared)
    assert get_model("by_entry_point") is PadstLM
    model = get_model("padst").create_from_arg_string(
        f"run={folder / 'run'},trainer.precision=float32", {"batch_size": 2, "device": "cuda:0"}
    )
    assert model.batch_size == 2 and model.max_length == CONTEXT


def test_what_cannot_be_is_one_line(folder: Path, real_run: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "broken.yaml").write_text(
        (folder / "tasks" / "choices.yaml").read_text().replace("docs.jsonl", "none.jsonl")
    )
    for changes, line in (
        ({"tasks": ("no_such_task",)}, "tasks: expected a task of the harness"),
        ({"run": str(real_run)}, "run: expected a language model of text, got "),
        ({"include_path": str(broken)}, "tasks: expected tasks whose data are there, got choices"),
    ):
        with pytest.raises(UserError) as caught:
            downstream(keys(folder, **{"tasks": ("choices",), **changes}), World())
        assert str(caught.value).startswith(line) and "\n" not in str(caught.value)
