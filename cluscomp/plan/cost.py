"""What a stage needs at its worst moment, in parts."""

from dataclasses import dataclass, field

from cluscomp.kernels.work import Work


@dataclass(frozen=True)
class Cost:
    """What a stage needs at its worst moment, in bytes by part, and its work.

    `device`: where the model computes (GPU memory, or RAM without a GPU); `host`: RAM in any case. Both are beside the
    process and its libraries. `relief` names settings that make it smaller. `least`: only a part of the work is known.
    """

    device: dict[str, float]
    host: dict[str, float] = field(default_factory=dict)
    work: Work = field(default_factory=Work)
    relief: str = ""
    least: bool = False


def worst(*moments: dict[str, float]) -> dict[str, float]:
    """The moment with the largest sum."""
    return max(moments, key=lambda parts: sum(parts.values()))
