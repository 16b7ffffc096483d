"""A weight and its inputs' second moment in coordinates turned on both sides, for methods that store `Rotated`."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cluscomp.forms.rotated import Rotated, rotated, signs_of_inputs, turned
from cluscomp.forms.stored import Stored
from cluscomp.solve.along_outputs import damped


@dataclass(frozen=True)
class Turned:
    """A weight (O, I) and the damped second moment (I, I) of its inputs, both in the coordinates of `seed`."""

    weight_OI: Float[Tensor, "O I"]
    moment_II: Float[Tensor, "I I"]
    seed: Int64[Tensor, "1"]

    def stored(self, inner: Stored) -> Rotated:
        """The stored form of the weight, of what was made of the turned one."""
        return Rotated(inner, self.seed, inputs=True, outputs=True)


def start(
    weight_OI: Float[Tensor, "O I"], moment_II: Float[Tensor, "I I"], damping: float, generator: torch.Generator
) -> Turned:
    """Turn a float32 weight (O, I) on both sides, and the second moment (I, I) with it, by a seed that is drawn.

    `damping` is added to the moment's diagonal, as a share of its mean.
    """
    seed = torch.randint(2**63 - 1, (1,), generator=generator).to(weight_OI.device)
    signs_I = signs_of_inputs(seed, len(moment_II))
    turned_II = turned(turned(damped(moment_II, damping), signs_I).T, signs_I)
    return Turned(rotated(weight_OI, seed, inputs=True, outputs=True), turned_II, seed)
