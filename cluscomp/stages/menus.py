"""Bits shared out over the whole model: what each block's layers may have is collected first, and then chosen."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluscomp import ranks
from cluscomp.solve.allocate import Menu, Option
from cluscomp.stages.allocation import Allocation
from cluscomp.store.records import read_sealed, write_sealed


class Menus:
    """The menus of all blocks, each in a file of the stage's folder that survives a kill."""

    def __init__(self, folder: Path, blocks: int) -> None:
        self._paths = [folder / f"menus-{index:03}.json" for index in range(blocks)]
        found = ranks.agreed(lambda: [read_sealed(path) for path in self._paths])
        self._blocks = [None if one is None else [_menu(menu) for menu in one["menus"]] for one in found]

    @property
    def last(self) -> int:
        """The last block without menus; -1 if all have theirs."""
        return max((index for index, menus in enumerate(self._blocks) if menus is None), default=-1)

    def wants(self, index: int) -> bool:
        """Whether a block's menus are not known, and this process is the one to ask for them."""
        return self._blocks[index] is None and ranks.mine(index)

    def keep(self, index: int, menus: list[Menu]) -> None:
        """Keep what a block's layers may have."""
        write_sealed(self._paths[index], {"menus": [asdict(menu) for menu in menus]})
        self._blocks[index] = menus

    def share_out(self, allocation: Allocation, bits: float) -> "Shares":
        """An option for each menu of all blocks, in `bits` a weight of them all."""
        menus = [menu for block in self._blocks for menu in block or []]
        picked = iter(allocation.share_out(menus, bits))
        blocks = [[(menu.names, next(picked)) for menu in block or []] for block in self._blocks]
        return Shares(blocks, bits, sum(menu.weights for menu in menus))


class Shares:
    """For each block its layers that go together, and the option chosen for them."""

    def __init__(self, blocks: list[list[tuple[list[str], Option]]], bits: float, weights: int) -> None:
        self.blocks, self._bits, self._weights = blocks, bits, weights

    def report(self) -> dict[str, float]:
        """The limit, what is spent and what is left of it, in bits a weight of all layers."""
        spent = sum(option.bits for block in self.blocks for _, option in block) / self._weights
        return {"limit": self._bits, "spent": spent, "left": self._bits - spent}


def _menu(values: dict[str, Any]) -> Menu:
    return Menu(values["names"], values["weights"], [Option(**option) for option in values["options"]])
