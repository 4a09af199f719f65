"""Dynamic sparse training of a tiny language model in transformers' own Trainer."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from from_yaml import from_yaml
from padst_exp.dst import Algorithm
from padst_exp.engine.adamw import AgeAwareAdamW
from padst_exp.engine.changes import topology_digest
from padst_exp.errors import UserError
from padst_exp.integrations.trainer import STATE, SparseTraining
from padst_exp.layers import sparse_weights
from padst_exp.permutations import PermutationLearner
from padst_exp.soft import soft_choices
from padst_exp.sparsify import Report, Rule, sparsify
from padst_exp.structures import NM, Structure
from permutation_cases import learned

pytest.importorskip("accelerate")  # Trainer exists without it, but makes none

STEPS = 20


class Counting(SparseTraining):
    """Remembers topologies and budgets after each step."""

    def __init__(self, report: Report, **how: Any) -> None:
        super().__init__(**how)
        self.report = report
        self.seen: dict[int, tuple[str, int, int]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.dynamics is not None and self.dynamics.step == state.global_step
        model = self.dynamics.model
        entries = sum(w.topology().num_entries for w in sparse_weights(model).values())
        self.seen[state.global_step] = topology_digest(model), entries, len(soft_choices(model))


OFTEN: dict[str, Any] = {"fraction": 0.4, "interval": 3, "stop": 0.9, "moments": "zero"}
AGES = (AgeAwareAdamW, {"lr": 0.02})


def rigl(**how: Any) -> Algorithm:
    return from_yaml("dst/rigl", **{**OFTEN, **how})


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "topologies": lambda: {"algorithm": rigl()},
    "permutations": lambda: {
        "algorithm": rigl(moments="age"), "learner": learned(), "optimizer_cls_and_kwargs": AGES
    },
    "exchanges": lambda: {
        "algorithm": rigl(), "learner": from_yaml("permutation/moves", every=1, significance=0.0)
    },
    "pruning": lambda: {"algorithm": from_yaml("dst/granet", **OFTEN)},
    "selections": lambda: {
        "algorithm": from_yaml("dst/dynadiag", freeze=0.6, interval=1),
        "structure": from_yaml("structure/diag"),
    },
}  # fmt: skip


def trainer(
    folder: Path,
    algorithm: Algorithm,
    learner: PermutationLearner | None = None,
    structure: Structure | None = None,
    optimizer_cls_and_kwargs: Any = None,
    **how: Any,
) -> tuple[Trainer, Counting]:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=17, n_positions=9, n_embd=16, n_layer=2, n_head=2, bos_token_id=None,
        eos_token_id=None, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    report = sparsify(
        model, [Rule("transformer.h.*.attn.c_attn", 3), Rule("transformer.h.*.mlp.c_*")],
        structure=structure or NM(n=1, m=None, group=4), density=0.25, learner=learner,
        algorithm=algorithm,
    )  # fmt: skip
    # Each token follows the one before: a little training shows.
    rows = (torch.arange(9)[None] + torch.arange(17)[:, None]) % 17
    data = [{"input_ids": row, "labels": row} for row in rows.repeat(4, 1)]
    arguments = TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=0.02,
        logging_steps=1, save_steps=10, report_to=[], use_cpu=True, disable_tqdm=True,
        gradient_accumulation_steps=2, **how,
    )  # fmt: skip
    callback = Counting(report, algorithm=algorithm, learner=learner)
    made = Trainer(
        model, arguments, train_dataset=data, callbacks=[callback],  # type: ignore[arg-type]
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
    )  # fmt: skip
    return made, callback


@pytest.mark.parametrize("case", CASES)
def test_it_learns_within_its_budget_and_resumes_as_if_nothing_happened(
    tmp_path: Path, case: str
) -> None:
    straight, callback = trainer(tmp_path / "run", **CASES[case]())
    before, soft = topology_digest(straight.model), len(soft_choices(straight.model))
    straight.train()
    budgets = [entries for _, entries, _ in callback.seen.values()]
    for row in callback.report.layers:
        rows, columns = row.shape
        assert abs(row.density - 0.25) * rows * columns < row.unit_entries, row
    if case in ("pruning", "selections"):
        assert budgets == sorted(budgets, reverse=True) and budgets[0] > budgets[-1]
    else:
        assert set(budgets) == {budgets[-1]}
    digests = [before, *(digest for digest, *_ in callback.seen.values())]
    changed = {step for step in range(1, STEPS + 1) if digests[step] != digests[step - 1]}
    assert changed if case == "selections" else changed >= set(range(3, 16, 3))
    assert (soft > 0) == (case in ("permutations", "selections"))
    assert callback.seen[STEPS][2] == 0
    losses = [row["loss"] for row in straight.state.log_history if "loss" in row]
    assert sum(losses[-4:]) < 0.85 * sum(losses[:4])
    assert callback.dynamics is not None and straight.optimizer is not None
    trained = {p for group in straight.optimizer.param_groups for p in group["params"]}
    assert trained == set(straight.model.parameters())

    resumed, again = trainer(tmp_path / "run", **CASES[case]())
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-10"))
    assert again.seen == {step: callback.seen[step] for step in range(11, STEPS + 1)}
    ours, theirs = (each.model.state_dict() for each in (resumed, straight))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert again.dynamics is not None
    assert again.dynamics.tracker.replaced == callback.dynamics.tracker.replaced


def test_what_it_cannot_do_is_one_line(tmp_path: Path) -> None:
    made, _ = trainer(tmp_path / "run", rigl(moments="age"))
    with pytest.raises(UserError, match=r"^dst.moments: expected zero, .* got age with AdamW$"):
        made.train()
    callback = SparseTraining(algorithm=rigl())
    with pytest.raises(UserError, match=r"^model: expected one after sparsify, got a dense one$"):
        callback.on_init_end(made.args, made.state, made.control, model=nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"^TrainingArguments.torch_compile: expected False, got"):
        trainer(tmp_path / "compiled", rigl(), torch_compile=True)


def test_a_checkpoint_without_its_state_or_with_that_of_another_is_refused(tmp_path: Path) -> None:
    made, _ = trainer(tmp_path / "run", rigl())
    made.train()
    first, last = (tmp_path / "run" / f"checkpoint-{step}" for step in (10, 20))
    shutil.copy(last / STATE, first / STATE)
    for message in (r"\(it is of step 20, not of 10\)$", "there is no such file"):
        again, _ = trainer(tmp_path / "run", rigl())
        with pytest.raises(UserError, match=message) as raised:
            again.train(resume_from_checkpoint=str(first))
        assert "\n" not in str(raised.value)
        (first / STATE).unlink(missing_ok=True)
