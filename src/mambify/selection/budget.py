"""The best choice of layers within a budget: a number of them, or bytes that one sequence may hold."""

from __future__ import annotations

from collections.abc import Mapping

from mambify.config import HybridConfig
from mambify.conversion.plan import plan, state_bytes, uniform_attention_layers
from mambify.errors import InvalidOptionError


def count_for_share(num_layers: int, share: float) -> int:
    """How many layers a share keeps: as many as the even spread.

    Raises:
        InvalidOptionError: not within [0, 1].
    """
    return len(uniform_attention_layers(num_layers, share))


def top_layers(worth: Mapping[int, float], count: int) -> list[int]:
    """The ``count`` layers of greatest worth; of equals the later ones, which is where the even spread puts them."""
    return sorted(sorted(worth, key=lambda index: (worth[index], index))[len(worth) - count :])


def best_within(worth: Mapping[int, float], costs: Mapping[int, int], budget: int) -> list[int]:
    """The layers of the greatest total worth whose costs add up to no more than ``budget``: a knapsack.

    A layer of negative worth is left out; of equal choices the later layers win, which is where the even spread puts
    them. Solved exactly; layers of one kind cost the same, so there are few sums to look at.
    """
    # cost so far → (worth, layers); a dearer choice that is worth no more is dropped.
    frontier: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for index in sorted(worth, reverse=True):
        if worth[index] <= 0.0:
            continue
        found = dict(frontier)
        for cost, (total, layers) in frontier.items():
            dearer, better = cost + costs[index], total + worth[index]
            if dearer <= budget and (dearer not in found or better > found[dearer][0]):
                found[dearer] = (better, [*layers, index])
        frontier, best = {}, -1.0
        for cost in sorted(found):
            if found[cost][0] > best:
                frontier[cost], best = found[cost], found[cost][0]
    return sorted(max(frontier.values(), key=lambda choice: choice[0])[1])


def attention_costs(config: HybridConfig, mixer: str, context: int) -> tuple[int, dict[int, int]]:
    """Bytes a sequence of ``context`` tokens holds without any attention, and what each layer's attention adds.

    At a short context attention may hold less than the mixer: it then costs nothing.
    """
    count = config.num_hidden_layers
    least = state_bytes(plan(config, mixer=mixer, attention_layers=[]).student, context)
    costs = {}
    for index in range(count):
        with_one = state_bytes(plan(config, mixer=mixer, attention_layers=[index]).student, context)
        costs[index] = max(with_one - least, 0)
    return least, costs


def budgeted_layers(
    config: HybridConfig, worth: Mapping[int, float], *, mixer: str, context: int, max_bytes: int
) -> list[int]:
    """The layers to keep so that one sequence of ``context`` tokens holds no more than ``max_bytes``.

    Raises:
        InvalidOptionError: it holds more even without attention; the message says how much.
    """
    least, costs = attention_costs(config, mixer, context)
    if least > max_bytes:
        raise InvalidOptionError(
            f"a budget of {max_bytes} bytes is too little: without any attention a sequence holds {least}"
        )
    return best_within(worth, costs, max_bytes - least)
