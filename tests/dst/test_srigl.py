import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from padst_exp.dst import Change, Signals, SRigL, Topology


def srigl(gamma: float = 0.5, *, ablation: bool = True, fraction: float = 0.5) -> SRigL:
    return SRigL(
        gamma=gamma, ablation=ablation, fraction=fraction, interval=10, stop=1.0, moments="age"
    )


def neurons(rows: int, inputs: int, fan_in: int, *, is_output: bool = False) -> Topology:
    """Rows that read their first `fan_in` inputs."""
    active = (torch.arange(rows)[:, None] * inputs + torch.arange(fan_in)).flatten()
    each = torch.ones(rows, dtype=torch.int64)
    return Topology(
        active, each * inputs, each, inputs, rows * inputs, each * fan_in, is_output
    )  # fmt: skip


def decide(
    algorithm: SRigL, topology: Topology, weights: torch.Tensor, gradients: torch.Tensor
) -> Change:
    given = Signals(
        magnitude=weights, dense_gradient=gradients, generator=torch.Generator(), progress=0.0
    )
    return algorithm.decide(topology, given, step=0, total=100, carry=0.0)[0]


@given(
    rows=st.integers(2, 9), inputs=st.integers(2, 9), share=st.floats(0.1, 1.0),
    gamma=st.floats(0.0, 1.0), ablation=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=80, deadline=None, derandomize=True)
def test_live_neurons_have_one_fan_in_and_the_budget_is_kept_but_for_a_remainder(
    rows: int, inputs: int, share: float, gamma: float, ablation: bool, seed: int
) -> None:
    fan_in = max(1, int(share * inputs))
    topology, generator = neurons(rows, inputs, fan_in), torch.Generator().manual_seed(seed)
    algorithm = srigl(gamma, ablation=ablation)
    for _ in range(4):
        # Some weights are zero still: just grown.
        weights = torch.rand(len(topology.active), generator=generator)
        weights = weights * (torch.rand(len(weights), generator=generator) > 0.2)
        gradients = torch.rand(rows, inputs, generator=generator) ** 4
        change = decide(algorithm, topology, weights, gradients)
        assert bool((change.active.diff() > 0).all())
        topology = topology.with_active(change.active)
        counts = topology.counts()
        live = counts[counts > 0]
        assert len(live.unique()) == 1 and int(live[0]) <= inputs
        assert ablation or len(live) == rows
        assert 0 <= rows * fan_in - len(topology.active) < len(live) or live[0] == inputs


def test_neurons_without_enough_salient_weights_are_ablated_and_may_return() -> None:
    topology = neurons(3, 4, 2)
    # Of 6 weights 3 are kept by size, none in row 2; of 12 gradients the 3 largest count.
    weights = torch.tensor([9.0, 8, 7, 1, 2, 3])
    gradients = torch.tensor([[0.0, 0, 5, 1], [0, 0, 6, 7], [0, 0, 0, 0.5]])
    change = decide(srigl(0.5), topology, weights, gradients)
    assert change.active.tolist() == [0, 1, 2, 4, 6, 7]
    # Then the largest gradients are all in row 2.
    again = topology.with_active(change.active)
    gradients = torch.tensor([[0.0, 0, 0, 0], [0, 0, 0, 0], [9, 9, 9, 8]])
    back = decide(srigl(0.5), again, torch.ones(6), gradients)
    assert again.with_active(back.active).counts().tolist() == [3, 0, 3]


def test_the_rows_of_the_output_layer_stay() -> None:
    weights = torch.tensor([9.0, 8, 7, 1, 2, 3])
    gradients = torch.tensor([[0.0, 0, 5, 1], [0, 0, 6, 7], [0, 0, 0, 0.5]])
    for algorithm, is_output in ((srigl(0.5), True), (srigl(0.5, ablation=False), False)):
        topology = neurons(3, 4, 2, is_output=is_output)
        change = decide(algorithm, topology, weights, gradients)
        assert topology.with_active(change.active).counts().tolist() == [2, 2, 2]


def test_no_more_neurons_are_ablated_than_the_others_have_inputs_for() -> None:
    topology = neurons(4, 4, 3)
    weights = torch.zeros(12)
    weights[:3] = torch.tensor([3.0, 2, 1])
    gradients = torch.zeros(4, 4)
    gradients[0] = 1.0
    counts = topology.with_active(decide(srigl(1.0), topology, weights, gradients).active).counts()
    assert int(counts.max()) <= 4 and int((counts > 0).sum()) >= 3
