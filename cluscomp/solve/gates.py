"""Gates on what layers may have: of nested levels each is the one below and an offset, which pays for its bits.

Single-path Bit Sharing (arXiv 2101.04935): W_k = W_(k-1) + g_k (W_k - W_(k-1)), and a closed gate g_k closes those
above it. There gates and weights learn together, by a sigmoid in the place of a step. Here the levels are what a method
makes of its own menu, and the price of a bit rises until all gates are closed, those first that are worth least a bit.
What a gate is worth is the gradient of the loss to it where it is half open: of a squared error that is, to the letter,
the difference between open and closed. So one training serves every limit, as ACIP's masks do.
"""

from collections.abc import Sequence
from dataclasses import replace

from cluscomp.solve.allocate import Menu, Option


def nested(menu: Menu, levels: int) -> list[Option]:
    """At most `levels` of a menu's options, least bits first: of falling damage, and about evenly apart in bits."""
    front = _front(menu)
    low, high = front[0].bits, front[-1].bits
    wanted = [low + (high - low) * place / (levels - 1) for place in range(levels)]
    near = {min(range(len(front)), key=lambda place: abs(front[place].bits - bits)) for bits in wanted}
    return [front[place] for place in sorted(near)]


class Gates:
    """The gates between the nested levels of some menus, all open: of n levels there are n - 1."""

    def __init__(self, levels: Sequence[Sequence[Option]]) -> None:
        self._bits = [[option.bits for option in each] for each in levels]
        self.top = [len(each) - 1 for each in levels]  # the uppermost level of each menu whose gate is open
        self.worth = [[0.0] * len(each) for each in levels]  # what the loss gains by each level over the one below
        self._seen = [0] * len(levels)  # batches that looked at the uppermost gate

    @property
    def left(self) -> int:
        """How many are open."""
        return sum(self.top)

    def learn(self, gradients: Sequence[float]) -> None:
        """Take in, for the uppermost open gate of each menu, the gradient of a batch's loss to it, half open."""
        for menu, gradient in enumerate(gradients):
            self._seen[menu] += 1
            known = self.worth[menu][self.top[menu]]
            self.worth[menu][self.top[menu]] += (-gradient - known) / self._seen[menu]

    def close(self, count: int) -> None:
        """Close the uppermost gate of the `count` menus where it is worth least a bit."""
        opened = [menu for menu, top in enumerate(self.top) if top]
        for menu in sorted(opened, key=self._a_bit)[:count]:
            self.top[menu] -= 1
            self._seen[menu] = 0

    def _a_bit(self, menu: int) -> float:
        top, bits = self.top[menu], self._bits[menu]
        return self.worth[menu][top] / (bits[top] - bits[top - 1])


def learned(menu: Menu, levels: Sequence[Option], worth: Sequence[float]) -> Menu:
    """A menu whose damages are what was learned: what is lost against the uppermost level, by the worth of each level.

    Between two levels it falls as the method's own. Options that take more bits than one of less damage are left out.
    """
    lost = [0.0] * len(levels)
    for place in range(len(levels) - 1, 0, -1):
        lost[place - 1] = lost[place] + max(worth[place], 0.0)

    def damage(option: Option) -> float:
        above = next(place for place, level in enumerate(levels) if option.damage >= level.damage)
        if option.damage == levels[above].damage:
            return lost[above]
        low, high = levels[above].damage, levels[above - 1].damage
        return lost[above] + (lost[above - 1] - lost[above]) * (option.damage - low) / (high - low)

    first, *others = sorted(_front(menu), key=lambda option: option is not menu.options[0])
    return replace(menu, options=[replace(option, damage=damage(option)) for option in (first, *others)])


def _front(menu: Menu) -> list[Option]:
    """The options that have less damage than all of fewer bits, and the first; those that beat it are left out."""
    first, *others = menu.options
    unlike = [one for one in others if (one.bits - first.bits) * (one.damage - first.damage) < 0]
    front: list[Option] = []
    for option in sorted([first, *unlike], key=lambda option: (option.bits, option.damage)):
        if not front or option.damage < front[-1].damage:
            front.append(option)
    return front
