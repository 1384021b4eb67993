"""Which layers stay: the most that fit, spread evenly."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import accumulate
from typing import Final

from asyncload.errors import PlanError
from asyncload.plan._needs import MODES, Mode, Needs

__all__ = ["fit", "least", "spread"]

# Every number of layers is tried; real models have some hundred at most.
_MOST_LAYERS: Final = 512


def spread(layers: int, resident: int) -> tuple[int, ...]:
    """The positions of the layers that stay, so evenly spaced that any run of k layers holds as many as any other, ±1.

    That goes for the layers that stream, too, and across the end: after the last layer a sweep begins anew.
    """
    return tuple((2 * index + 1) * layers // (2 * resident) for index in range(resident))


def fit(needs: Needs, modes: Collection[Mode], slots: int, available: int) -> tuple[Mode, tuple[int, ...]] | None:
    """The fastest of the modes that fits, with the numbers of the layers that stay; None if none does."""
    for mode in MODES:
        if mode in modes:
            for resident in _choices(needs, mode, _most_resident(needs, slots, available)):
                if sum(needs.breakdown(resident, slots).values()) <= available:
                    return mode, resident
    return None


def least(needs: Needs, modes: Collection[Mode], slots: int) -> tuple[Mode, dict[str, int]]:
    """The mode that takes the least, and its breakdown; raises ``PlanError`` where the layers allow none of them."""
    choices: list[tuple[Mode, dict[str, int]]] = [
        (mode, needs.breakdown(resident, slots))
        for mode in MODES
        if mode in modes
        for resident in _choices(needs, mode, len(needs.weights.layers))
    ]
    if not choices:
        count = len(needs.weights.layers)
        raise PlanError(f"a model of {count} layers cannot be run in mode {' or '.join(modes)}")
    return min(choices, key=lambda choice: sum(choice[1].values()))


def _choices(needs: Needs, mode: Mode, most: int) -> Iterator[tuple[int, ...]]:
    """The layers that may stay in a mode, ``most`` of them first."""
    numbers = tuple(needs.weights.layers)
    if mode == "full":
        yield numbers
    elif not numbers or len(numbers) > _MOST_LAYERS:
        return
    elif mode == "stream":
        yield ()
    else:
        for count in range(min(most, len(numbers) - 1), 0, -1):
            yield tuple(numbers[position] for position in spread(len(numbers), count))


def _most_resident(needs: Needs, slots: int, available: int) -> int:
    """No more layers than this fit, whichever they are."""
    layers = needs.weights.layers.values()
    sizes = sorted(layer.resident_nbytes + layer.prefill_nbytes for layer in layers)
    smallest = min((layer.nbytes for layer in layers), default=0)
    rest = available - sum(needs.breakdown((), 0).values()) - slots * smallest
    return sum(total <= rest for total in accumulate(sizes))
