"""Which pairs of bits are worth a search: the Pareto front of every layer, and layers that can share one choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from methods.kvtuner import Pair

#: errors of a layer's attention output by pair, `e_o` of the paper
Errors = Mapping[Pair, float]


@dataclass(frozen=True)
class Group:
    """Layers that use the same pair, and the pairs they choose from, most bits first."""

    layers: tuple[int, ...]
    pairs: tuple[Pair, ...]


def pareto_pairs(errors: Errors) -> tuple[Pair, ...]:
    """The pairs that no other pair beats in bits and error, most bits first.

    Where two need the same bits and err the same, the one with more bits for keys stays.
    """
    front: list[Pair] = []
    for pair in sorted(errors, key=lambda pair: (pair.bits, errors[pair], -pair.key)):
        if not front or errors[pair] < errors[front[-1]]:
            front.append(pair)
    return tuple(reversed(front))


def group_layers(
    profile: Sequence[Errors], eps: float = 0.05, min_samples: int = 2, outliers: str = "together"
) -> list[Group]:
    """Groups of layers with the same pairs to choose from and similar errors; ordered by their first layers.

    profile: one entry per layer.  eps, min_samples: DBSCAN's, Euclidean on the errors of the pairs that are left.
    outliers: layers of a set of pairs that DBSCAN puts nowhere are one group ("together") or one each ("apart").
    """
    from sklearn.cluster import DBSCAN

    members: dict[tuple[Pair, ...], list[int]] = {}
    for layer, errors in enumerate(profile):
        members.setdefault(pareto_pairs(errors), []).append(layer)
    groups = []
    for pairs, layers in members.items():
        points = [[profile[layer][pair] for pair in pairs] for layer in layers]
        alike: dict[tuple[int, int], list[int]] = {}
        for layer, label in zip(layers, DBSCAN(eps=eps, min_samples=min_samples).fit_predict(points).tolist()):
            alike.setdefault((label, layer if label < 0 and outliers == "apart" else -1), []).append(layer)
        groups += [Group(tuple(layers_alike), pairs) for layers_alike in alike.values()]
    return sorted(groups, key=lambda group: group.layers)
