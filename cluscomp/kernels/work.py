"""Amounts of work: what the planner adds up. Without torch, as settings of machines need it."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Work:
    """Amounts of work.

    `flops` of matrix products, bytes of `traffic` of all else, bytes `read` from files, `distances` of searches for the
    nearest centroid without an index, `pruned` point-iterations of K-means, counted at D = 4, `calls` of torch.
    """

    flops: float = 0
    traffic: float = 0
    read: float = 0
    distances: float = 0
    pruned: float = 0
    calls: float = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, name) + getattr(other, name) for name in KINDS))

    def __mul__(self, times: float) -> "Work":
        return Work(*(getattr(self, name) * times for name in KINDS))


KINDS = tuple(one.name for one in fields(Work))
