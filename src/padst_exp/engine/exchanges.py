"""Exchanges of hard permutations in training: their values, and all that must follow, go along."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from padst_exp.engine.changes import Changeable, Method, adopt, finish, followers
from padst_exp.engine.distributed import own_part
from padst_exp.layers import SparseWeight, evidence, places
from padst_exp.permutations import Permutation


def weights_of(state: Changeable, due: Mapping[str, Permutation]) -> list[SparseWeight]:
    """The sparse weights that these permutations act on, each once."""
    found = [place.weight for choice in due.values() for place in places(state.model, choice)]
    return list(dict.fromkeys(found))


def collecting(
    experiment: Method,
    state: Changeable,
    changing: Sequence[SparseWeight],
    due: Mapping[str, Permutation],
) -> list[SparseWeight]:
    """Let the weights whose change needs dense gradients collect them, until told otherwise."""
    found = list(changing) if "dense_gradient" in experiment.algorithm.needs else []
    if halves := experiment.learner.parts:
        for weight in weights_of(state, due):
            weight.gradient_parts = halves
            found.append(weight)
    for weight in found:
        weight.collect_dense_gradient = True
    return found


def stop_collecting(weights: Iterable[SparseWeight]) -> None:
    """Let them collect dense gradients no more; what they have stays."""
    for weight in weights:
        weight.collect_dense_gradient, weight.gradient_parts = False, 0


def keep_gradients(experiment: Method, changing: Iterable[SparseWeight]) -> None:
    """Keep what scores ask of the gradients of values, before clipping."""
    if "weight_gradient" in experiment.algorithm.needs:
        for weight in changing:
            gradient = weight.values.grad
            weight.weight_gradient = None if gradient is None else own_part(gradient).clone()


def exchange(
    experiment: Method, state: Changeable, due: Mapping[str, Permutation]
) -> dict[str, Any]:
    """Let the learner exchange those permutations that are due, by name.

    Returns:
        What happened: how many permutations were exchanged, how many features of them have
        another slot now, how many entries lost their value.
    """
    learner, world, following = experiment.learner, state.world, followers(experiment, state)
    fraction = 0.0
    if learner.spends_drops:
        fraction = experiment.algorithm.drop_fraction(state.step, experiment.total_steps)
    weights = weights_of(state, due) if learner.parts else []
    world.mean_([w.part_gradients for w in weights if w.part_gradients is not None])
    done = {"exchanged": 0, "moved": 0, "lost": 0}
    for name, permutation in due.items():
        found = list(places(state.model, permutation))
        with state.placement.whole(state, [place.name for place in found]):
            known = None
            if learner.parts:
                topologies = [place.weight.topology() for place in found]
                changing = filter(experiment.algorithm.can_change, topologies)
                known = evidence(found, fraction * sum(each.num_entries for each in changing))
            # Rank 0 decides for all: a rounding difference must not part the ranks.
            proposal = world.from_main(learner.exchange(permutation, known))
            if proposal is None:
                continue
            before = permutation.held().clone()
            proposal = proposal.to(before.device)
            for place in found:
                # Its own order of features is still the old one.
                move = adopt(
                    place.name, place.weight, place.change(before, proposal), following, state.step
                )
                done["lost"] += move.num_new  # as many as are new in others' places
                if learner.spends_drops:
                    place.weight.carry -= move.num_new / place.weight.geometry.unit_size
        permutation.exchange(proposal)
        if state.average is not None:
            state.average.exchange(name, proposal)
        done["exchanged"] += 1
        done["moved"] += int((proposal.index != before).sum())
    for weight in weights:
        weight.part_gradients = weight.dense_gradient = None
    finish(state, "permutations")
    return done
