"""Bits for weights whose damage falls exponentially with them: one answer in closed form, up to a price for all.

Two papers' rules for sharing bits out over a model, in the terms of stored bits. OPQ (arXiv 2205.11141) takes the
squared error of a uniform step, a quarter for each bit, for every layer; steps are then as w^-1/2 for weights that
count w. Its normalisation is not public: the derivation is ours, and that w follows from the damage of a layer's first
option. Collaborative Compression (arXiv 2105.11228) fits an exponential to each layer's own damages and looks for the
rates at which the next bit is worth the same everywhere.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

FALL = math.log(4)  # of the logarithm of a squared error with a bit, if nothing else is known


@dataclass(frozen=True)
class Curve:
    """So many `weights` take exp(`start` - `fall` b) damage at b bits each, b between `least` and `most`."""

    weights: int
    start: float
    fall: float
    least: float
    most: float

    def bits(self, price: float) -> float:
        """Where one more bit of all weights takes off exp(`price`) damage a weight, or the bound nearest to that."""
        best = (self.start + math.log(self.fall / self.weights) - price) / self.fall
        return min(max(best, self.least), self.most)

    def price(self, bits: float) -> float:
        """The price at which `bits` has this many bits."""
        return self.start + math.log(self.fall / self.weights) - self.fall * bits


def of_first(weights: int, points: Sequence[tuple[float, float]]) -> Curve:
    """OPQ's curve: through the first of some points (bits, damage), a quarter for each bit."""
    bits, damage = points[0]
    return _curve(weights, points, _log(damage) + FALL * bits, FALL)


def fitted(weights: int, points: Sequence[tuple[float, float]]) -> Curve:
    """Collaborative Compression's curve: a straight line through (bits, log damage), points weighted by their damage.

    Where damage does not fall with bits, or one point alone says something, it is OPQ's.
    """
    known = [(bits, math.log(damage), damage) for bits, damage in points if damage > 0]
    total = sum(weight for _, _, weight in known)
    if not known:
        return of_first(weights, points)
    x, y = (sum(one[axis] * one[2] for one in known) / total for axis in (0, 1))
    spread = sum(weight * (bits - x) ** 2 for bits, _, weight in known)
    slope = sum(weight * (bits - x) * (log - y) for bits, log, weight in known) / spread if spread else 0.0
    return of_first(weights, points) if slope >= 0 else _curve(weights, points, y - slope * x, -slope)


def rates(curves: Sequence[Curve], bits: float) -> list[float]:
    """Bits a weight for each curve, at most `bits` a weight of all together, for the least damage of all.

    That is where the next bit is worth the same for all that are not at a bound; this worth is found by bisection.
    Where all at their least take more, it is their least.
    """
    limit = bits * sum(curve.weights for curve in curves)
    low = min(curve.price(curve.most) for curve in curves)
    high = max(curve.price(curve.least) for curve in curves)
    if _total(curves, low) <= limit:
        return [curve.bits(low) for curve in curves]
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if _total(curves, middle) <= limit else (middle, high)
    return [curve.bits(high) for curve in curves]


def _total(curves: Sequence[Curve], price: float) -> float:
    return sum(curve.weights * curve.bits(price) for curve in curves)


def _curve(weights: int, points: Sequence[tuple[float, float]], start: float, fall: float) -> Curve:
    return Curve(weights, start, fall, min(bits for bits, _ in points), max(bits for bits, _ in points))


def _log(damage: float) -> float:
    return math.log(max(damage, 1e-300))  # of weights that nothing is lost of
