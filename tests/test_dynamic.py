"""Dynamic sparse training in a loop of one's own."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from padst_exp.config import option
from padst_exp.dynamic import DynamicSparsity
from padst_exp.engine.adamw import AgeAwareAdamW
from padst_exp.engine.changes import topology_digest
from padst_exp.errors import UserError
from padst_exp.inference import load, save
from padst_exp.layers import sparse_weights
from padst_exp.soft import soft_choices
from padst_exp.sparsify import Report, Rule, sparsify
from permutation_cases import learned

STEPS = 20
X = torch.randn(64, 5, 7, generator=torch.Generator().manual_seed(0))
Y = torch.arange(64) % 3


class Net(nn.Module):
    """Attention from one query over five tokens, which reads its weights, then an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(7, 16)
        self.query = nn.Parameter(torch.randn(1, 1, 16))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 33), nn.GELU(), nn.Linear(33, 3))
        self.spare = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        query = self.query.expand(len(x), -1, -1)
        read: Tensor = self.attention(query, x, x, need_weights=False)[0]
        logits: Tensor = self.mlp(read[:, 0])
        return logits


def net(*more: str, **how: Any) -> tuple[nn.Module, Report]:
    torch.manual_seed(0)
    model = Net()
    rules = [Rule(pattern) for pattern in ("attention*", "mlp.0", *more)]
    return model, sparsify(model, rules, structure=option("structure/fan_in"), density=0.4, **how)


OFTEN: dict[str, Any] = {"interval": 3, "fraction": 0.4, "stop": 0.9, "moments": "zero"}
ADAMW = (torch.optim.AdamW, {"lr": 0.01})
CASES: dict[str, tuple[Any, Any, Any]] = {
    "rigl, learned": (lambda: option("dst/rigl", **OFTEN), learned, ADAMW),
    "ages": (
        lambda: option("dst/rigl", **OFTEN | {"moments": "age"}), lambda: None,
        (AgeAwareAdamW, {"lr": 0.01}),
    ),
    "mest, sgd": (
        lambda: option("dst/mest", **OFTEN), lambda: None,
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    ),
    "pruning": (lambda: option("dst/granet", **OFTEN), lambda: None, ADAMW),
    "dynadiag": (lambda: option("dst/dynadiag", freeze=0.6, interval=1), lambda: None, ADAMW),
}  # fmt: skip


class Loop:
    """A plain training loop, that can stop and go on."""

    def __init__(self, case: str, saved: dict[str, Any] | None = None) -> None:
        algorithm, learner, (kind, settings) = CASES[case]
        method = {"algorithm": algorithm(), "learner": learner()}
        self.model, self.report = net(**method)
        if saved is not None:
            self.model.load_state_dict(saved["model"])
        self.optimizer = kind(self.model.parameters(), **settings)
        self.dynamics = DynamicSparsity(self.model, self.optimizer, total_steps=STEPS, **method)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, total_iters=STEPS)
        if saved is not None:
            self.optimizer.load_state_dict(saved["optimizer"])
            self.schedule.load_state_dict(saved["schedule"])
            self.dynamics.load_state_dict(saved["dynamics"])
        self.digests: list[str] = []
        self.entries: list[int] = []

    def run(self, until: int) -> None:
        while self.dynamics.step < until:
            first = self.dynamics.step * 8 % 64
            for part in (slice(first, first + 4), slice(first + 4, first + 8)):
                (nn.functional.cross_entropy(self.model(X[part]), Y[part]) / 2).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
            self.digests.append(topology_digest(self.model))
            topologies = [weight.topology() for weight in sparse_weights(self.model).values()]
            self.entries.append(sum(topology.num_entries for topology in topologies))

    def state(self) -> dict[str, Any]:
        parts = ("model", "optimizer", "schedule", "dynamics")
        return copy.deepcopy({part: getattr(self, part).state_dict() for part in parts})


@pytest.mark.parametrize("case", CASES)
def test_it_keeps_its_budget_changes_units_and_resumes_bitwise(case: str) -> None:
    loop = Loop(case)
    soft, before = len(soft_choices(loop.model)), topology_digest(loop.model)
    assert (soft > 0) == (case in ("rigl, learned", "dynadiag"))
    loop.run(10)
    saved = loop.state()
    loop.run(STEPS)
    for row in loop.report.layers:
        rows, columns = row.shape
        assert abs(row.density - 0.4) * rows * columns <= rows, row  # one input of every row
    assert not soft_choices(loop.model)
    if case in ("pruning", "dynadiag"):
        assert loop.entries == sorted(loop.entries, reverse=True)
        assert loop.entries[0] > loop.entries[-1]
    else:
        assert len({*loop.entries}) == 1
        assert loop.dynamics.tracker.updates == 5  # every third step, while at most 0.9 are over
        assert sum(loop.dynamics.tracker.replaced.values()) > 0 and loop.digests[-1] != before
    trained = {p for group in loop.optimizer.param_groups for p in group["params"]}
    assert trained == set(loop.model.parameters())

    again = Loop(case, saved)
    again.run(STEPS)
    assert again.digests == loop.digests[10:]
    theirs = loop.model.state_dict()
    assert all(torch.equal(t, theirs[name]) for name, t in again.model.state_dict().items())


def test_a_model_comes_back_packed(tmp_path: Path) -> None:
    loop = Loop("rigl, learned")
    with pytest.raises(ValueError, match="still soft"):
        save(loop.model, tmp_path / "early")
    loop.run(STEPS)
    loop.model.eval()
    save(loop.model, tmp_path / "packed")
    loaded = load(tmp_path / "packed", model=Net())
    assert "mlp.0.parts.0.values" in loaded.state_dict()
    torch.testing.assert_close(loaded(X), loop.model(X), atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match=r"give it to load\(\.\.\., model=\.\.\.\)$"):
        load(tmp_path / "packed")
    with pytest.raises(UserError, match=r"holds an export already"):
        save(loop.model, tmp_path / "packed")


def test_what_cannot_work_is_one_line() -> None:
    rigl = option("dst/rigl", **OFTEN)
    early = torch.optim.SGD(Net().parameters(), lr=0.1)
    model, _ = net(algorithm=rigl)
    for message, arguments, how in (
        (r"^model: expected one after sparsify", (Net(), early), {"algorithm": rigl}),
        (r"^optimizer: it has no \S+\.values; make it after", (model, early), {"algorithm": rigl}),
        (
            r"^dst\.moments: expected zero, .* got age with SGD$",
            (model, torch.optim.SGD(model.parameters(), lr=0.1)),
            {"algorithm": option("dst/rigl", moments="age")},
        ),
    ):
        with pytest.raises(UserError, match=message) as raised:
            DynamicSparsity(*arguments, total_steps=STEPS, **how)
        assert "\n" not in str(raised.value)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    DynamicSparsity(model, optimizer, algorithm=rigl, total_steps=STEPS)
    with pytest.raises(UserError, match=r"^optimizer: expected .* got a closure$"):
        optimizer.step(lambda: 0.0)


def test_a_layer_that_no_gradient_reaches_is_named() -> None:
    rigl = option("dst/rigl", **OFTEN | {"interval": 1})
    model, _ = net("spare", algorithm=rigl)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    DynamicSparsity(model, optimizer, algorithm=rigl, total_steps=STEPS)
    before = topology_digest(model)
    model(X).sum().backward()
    with pytest.raises(UserError, match=r"^layer spare\.weights\.0: .* none at step 1; leave"):
        optimizer.step()
    assert topology_digest(model) == before


def test_moves_need_layers_that_are_called() -> None:
    method = {
        "algorithm": option("dst/rigl", **OFTEN | {"interval": 1}),
        "learner": option("permutation/moves", every=1),
    }
    model, _ = net(**method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    DynamicSparsity(model, optimizer, total_steps=STEPS, **method)
    model(X).sum().backward()
    with pytest.raises(UserError, match=r"of attention\S+ its weight is read, as by nn\.Multihead"):
        optimizer.step()


def test_after_remove_a_step_is_a_step() -> None:
    loop = Loop("rigl, learned")
    loop.dynamics.remove()
    before = topology_digest(loop.model)
    loop.model(X).sum().backward()
    for _ in range(4):
        loop.optimizer.step()
    assert topology_digest(loop.model) == before and loop.dynamics.step == 0


def test_another_one_takes_the_place_of_the_first() -> None:
    rigl = option("dst/rigl", **OFTEN)
    model, _ = net(algorithm=rigl)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second = (
        DynamicSparsity(model, optimizer, algorithm=rigl, total_steps=STEPS) for _ in range(2)
    )
    for _ in range(3):
        model(X).sum().backward()
        optimizer.step()
    assert (first.step, first.tracker.updates) == (0, 0)
    assert (second.step, second.tracker.updates) == (3, 1)


def test_options_are_those_of_the_command_line() -> None:
    assert option("structure/block", size=16).size == 16
    for path, how, message in (
        ("structure/diagonal", {}, r"^structure: there is no 'diagonal'; did you mean diag\?$"),
        ("structures/diag", {}, r"^option: expected <group>/<option>"),
        ("structure/diag", {"bundle": "strid"}, r"^structure\.bundle: expected 1 or stride or"),
        ("dst/rigl", {"alpha": 0.3}, r"^dst\.alpha: unknown key"),
        ("dst/rigl", {"moments": "zeros"}, r"^dst\.moments: expected age or zero, got 'zeros'"),
    ):
        with pytest.raises(UserError, match=message):
            option(path, **how)
