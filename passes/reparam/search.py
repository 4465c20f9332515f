"""Which order of in-features lets an N:M pattern keep most: scores in, permutations out. No model, no folding.

A score is a matrix [R, T]: rows that compete apart, T features that may change places; places come in groups of ``m``,
each row keeping the ``n`` largest of a group. ``order[t]`` is the feature at place t. A last group of fewer than m
places is left as it is. All is deterministic: ties go to the lower index.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray


def kept(score: torch.Tensor, order: torch.Tensor, n: int, m: int) -> float:
    """The sum of what whole groups keep under ``order``, fp64."""
    whole = len(order) // m * m
    groups = score[:, order[:whole]].view(len(score), -1, m)
    return float(groups.topk(n, -1).values.double().sum())


def deal(score: torch.Tensor, m: int, *, snake: bool) -> torch.Tensor:
    """Spread strong features over groups: rank them, cut the ranking into m strips, give each group one of each.

    ``snake``: every second strip runs backwards and ranks are by sum (RIA's heuristic channel reallocation); else
    all run forwards and ranks are by l2 norm (E-Sparse's global naive shuffle).
    """
    whole = score.shape[1] // m * m
    order = torch.arange(score.shape[1], device=score.device)
    worth = score[:, :whole].double()
    worth = worth.sum(0) if snake else worth.square().sum(0)
    strips = worth.argsort(descending=True, stable=True).view(m, -1)
    if snake:
        strips[1::2] = strips[1::2].flip(1)
    order[:whole] = strips.t().reshape(-1)
    return order


def reassign(score: torch.Tensor, order: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Refine an order place by place: the t-th features of all groups are dealt anew by a linear assignment.

    Zhang et al., "Plug-and-Play", 2024 (RIA), section 3.3. What the groups keep never falls.
    """
    whole = len(order) // m * m
    groups = order[:whole].view(-1, m).clone()
    for place in range(m):
        worth = _worth(score, groups, groups[:, place], n, torch.arange(len(groups)) * m + place)
        chosen = assign(worth.t())
        if worth[chosen, torch.arange(len(groups))].sum() > worth.diagonal().sum():
            groups[:, place] = groups[chosen.to(groups.device), place]
    return torch.cat([groups.reshape(-1), order[whole:]])


def swap(score: torch.Tensor, order: torch.Tensor, n: int, m: int, *, block: int, rounds: int = 32) -> torch.Tensor:
    """Refine an order by exchanging features between groups of the same ``block`` of places, best gain first.

    E-Sparse's local block shuffle (Li et al., 2023, section 3.2). Swaps done in one round touch different groups, so
    their gains add up exactly and what the groups keep never falls.
    """
    order = order.clone()
    whole = len(order) // m * m
    width = max(block // m, 2) * m
    for start in range(0, whole, width):
        places = order[start : min(start + width, whole)]
        for _ in range(rounds):
            pairs = _best_swaps(score, places, n, m)
            if not len(pairs):
                break
            left, right = pairs.t()
            places[left], places[right] = places[right], places[left]  # a view: writes ``order``
    return order


def _best_swaps(score: torch.Tensor, places: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Pairs of places [P, 2] whose exchange pays, at most one for each group."""
    worth = _worth(score, places.view(-1, m), places, n, torch.arange(len(places)))
    own = worth.diagonal()
    gain = worth + worth.t() - own[:, None] - own[None, :]
    group = torch.arange(len(places), device=gain.device) // m
    gain[group[:, None] >= group[None, :]] = 0.0  # each pair once, and none inside a group
    least = 1e-6 * float(own.abs().max())  # less is rounding, and would swap for ever
    left, right = (gain > least).nonzero(as_tuple=True)
    best = gain[left, right].argsort(descending=True, stable=True)
    used: set[int] = set()
    pairs = []
    for a, b in zip(left[best].tolist(), right[best].tolist(), strict=True):
        if used.isdisjoint((a // m, b // m)):
            used.update((a // m, b // m))
            pairs.append((a, b))
            if len(used) > len(places) // m - 2:
                break
    return torch.tensor(pairs, dtype=torch.int64, device=places.device).view(-1, 2)


def _worth(
    score: torch.Tensor, groups: torch.Tensor, features: torch.Tensor, n: int, places: torch.Tensor
) -> torch.Tensor:
    """[features, places] fp64: what the place's group would keep with that feature there.

    ``groups`` [G, m] holds features; ``places`` count along them row by row. Without the feature at the place, a row
    keeps its n largest others; a newcomer v adds max(v - b, 0), b the n-th of them. As max(z, 0) = (|z| + z) / 2, the
    sum of that over rows is an l1 distance and two sums.
    """
    m = groups.shape[1]
    group, leaving = places.to(score.device) // m, score[:, groups.reshape(-1)[places]]
    best = score[:, groups].topk(n + 1, -1).values[:, group]  # [R, places, n + 1]
    held = leaving >= best[..., n - 1]  # the one that leaves was kept, so the next takes its room
    bar = torch.where(held, best[..., n], best[..., n - 1]).double()
    rest = torch.where(held, best.sum(-1) - leaving, best[..., :n].sum(-1)).double().sum(0)
    newcomers = score[:, features].double()
    gained = torch.cdist(newcomers.t(), bar.t(), p=1.0) + newcomers.sum(0)[:, None] - bar.sum(0)[None, :]
    return gained / 2 + rest


def assign(worth: torch.Tensor) -> torch.Tensor:
    """One object for each person so that the sum of ``worth`` [persons, objects] (square) is largest; int64.

    An auction with falling epsilon (Bertsekas, 1988): within 1e-3 of the spread of ``worth`` of the optimum.
    """
    size = len(worth)
    values: NDArray[np.float64] = worth.double().cpu().numpy()
    spread = float(values.max() - values.min()) if size > 1 else 0.0
    if spread == 0.0:
        return torch.arange(size)
    price = np.zeros(size)
    epsilon, last = spread / 4, 1e-3 * spread / size
    while True:
        chosen = _auction(values, price, epsilon)
        if epsilon <= last:
            return torch.from_numpy(chosen)
        epsilon = max(epsilon / 5, last)


def _auction(values: NDArray[np.float64], price: NDArray[np.float64], epsilon: float) -> NDArray[np.int64]:
    """Persons without an object bid for their best at once; the highest bid takes it. ``price`` is written."""
    size = len(values)
    chosen = np.full(size, -1)
    owner = np.full(size, -1)
    while len(free := np.flatnonzero(chosen < 0)):
        net = values[free] - price
        best = net.argmax(1)
        rows = np.arange(len(free))
        first = net[rows, best]
        net[rows, best] = -np.inf
        bid = price[best] + first - net.max(1) + epsilon
        by_bid = np.lexsort((-free, bid))  # the last to write an object is its highest bidder, the first among equals
        winner = np.full(size, -1)
        winner[best[by_bid]] = by_bid
        sold = np.flatnonzero(winner >= 0)
        lost = owner[sold]
        chosen[lost[lost >= 0]] = -1
        owner[sold] = free[winner[sold]]
        chosen[owner[sold]] = sold
        price[sold] = bid[winner[sold]]
    return chosen.astype(np.int64)
