"""Codes chosen one round after the other, each round's error handed on: compiled, and the same in plain torch."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cluscomp.kernels import lloyd_torch
from cluscomp.kernels.counting import report
from cluscomp.kernels.lloyd import assign
from cluscomp.kernels.loading import native, number_of_threads
from cluscomp.kernels.work import Work

Given = tuple[Int[Tensor, "R G"], Float[Tensor, "R O"]]


class Feedback:
    """One codebook, made ready to be searched for many rounds of `choose`.

    Args:
        centroids_KD: (K, D), compared in float32.
        outputs: O, of which D at a time are one group; the last of the G = ceil(O / D) groups may be padded.
        threads: of the CPU; as many as torch uses, where None. The result does not depend on it.
    """

    def __init__(self, centroids_KD: Float[Tensor, "K D"], outputs: int, threads: int | None = None) -> None:
        self._centroids_KD, self._outputs = centroids_KD.float().contiguous(), outputs
        self._threads = number_of_threads(threads)
        self._index = None
        if native is not None and self._centroids_KD.device.type == "cpu":
            self._index = native.Index(self._centroids_KD, self._threads)

    def choose(
        self,
        wanted_RP: Float[Tensor, "R P"],
        factor_RR: Float[Tensor, "R R"],
        before_RP: Float[Tensor, "R P"] | None = None,
    ) -> Given:
        """The codes (R, G) of R rounds, and the errors (R, O) they leave.

        Round i takes the nearest centroids of the rows of wanted[i] (P = G D numbers). Its error is
        (wanted[i] - chosen) / factor[i, i], or that of before[i] where given, and each later wanted[j] loses
        factor[i, j] times the error. Every product and difference is rounded by itself, in this order, so the result
        is the same on every machine. `wanted_RP` is overwritten.

        Raises:
            ValueError: a wanted value is not finite.
        """
        (rounds, width), (size, dim) = wanted_RP.shape, self._centroids_KD.shape
        codes_RG = wanted_RP.new_empty(rounds, width // dim, dtype=torch.int32)
        errors_RO = wanted_RP.new_empty(rounds, self._outputs)
        if wanted_RP.is_meta:
            report(
                Work(flops=1.0 * rounds * errors_RO.numel(), distances=1.0 * codes_RG.numel() * size, calls=8 * rounds)
            )
            return codes_RG, errors_RO
        if native is None or self._index is None:
            return self._in_torch(wanted_RP, factor_RR, before_RP)
        native.feedback(self._index, wanted_RP, before_RP, factor_RR.contiguous(), codes_RG, errors_RO, self._threads)
        return codes_RG, errors_RO

    def _in_torch(self, wanted_RP: Tensor, factor_RR: Tensor, before_RP: Tensor | None) -> Given:
        """What the compiled code is compared with, and replaced by where missing and on a GPU."""
        outputs, dim = self._outputs, self._centroids_KD.shape[1]
        base_RP = wanted_RP if before_RP is None else before_RP
        search = lloyd_torch.assign if native is None else assign  # with faiss, if it is there
        codes, errors = [], []
        for i, wanted_P in enumerate(wanted_RP):
            codes_G, _ = search(wanted_P.view(-1, dim), self._centroids_KD)
            chosen_P = self._centroids_KD[codes_G.long()].flatten()
            error_O = (base_RP[i] - chosen_P)[:outputs] / factor_RR[i, i]
            wanted_RP[i + 1 :, :outputs] -= factor_RR[i, i + 1 :, None] * error_O
            codes.append(codes_G)
            errors.append(error_O)
        return torch.stack(codes), torch.stack(errors)
