"""Codes that move while a codebook weight learns: PV-Tuning (arXiv 2405.14852)."""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cluscomp.forms.codebook import CodebookWeight, sub_vectors
from cluscomp.kernels.codes import code_bits, pack
from cluscomp.solve.kmeans import nearest


class MovingCodes(CodebookWeight):
    """In the place of a codebook weight while it is trained: its codes may move to where its sub-vectors want to be.

    While it learns each sub-vector has a `shift` (N, D) float32, which is no part of the weight but gets the weight's
    gradient, as if it were added (straight through). The optimizer changes it; then `move` lets the sub-vectors with
    the largest shifts take the centroids nearest to where they would be. A shift goes on from step to step, as in the
    authors' code (`delta_decay 0`): one step alone crosses no border between centroids. With several codebooks the
    codes are chosen one after the other, the others fixed; theirs is a beam search.
    """

    def __init__(self, weight: CodebookWeight) -> None:
        """Takes over all tensors of a weight, the trained one as the same object; `give_back` hands them back."""
        super().__init__(
            weight.codes, weight.codebooks.data, weight.scales,
            out_features=weight.out_features, in_features=weight.in_features, axis=weight.axis, storage=weight.storage,
        )  # fmt: skip
        self.codebooks, self.follows = weight.codebooks, weight.follows
        self.shift = nn.Parameter(torch.empty(0), requires_grad=False)
        self._weight = (weight,)  # in a tuple, or it would be a part of this module

    def give_back(self) -> CodebookWeight:
        """The weight that it stands for, with what was learned."""
        (weight,) = self._weight
        weight.codes, weight.scales = self.codes, self.scales
        return weight

    def to_masters(self) -> None:
        """Begin to learn, with no shifts."""
        super().to_masters()
        shape = self.num_codes, self.codebooks.shape[2]
        self.shift.data = torch.zeros(shape, device=self.codebooks.device)
        self.shift.requires_grad_(True)

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take back the codes, codebooks and scales of a `state_dict` made before `to_masters`."""
        super().restore({name: tensor for name, tensor in state.items() if name != "shift"})

    def _freeze(self) -> None:
        super()._freeze()
        self.shift.requires_grad_(False)
        self.shift.data, self.shift.grad = self.shift.data.new_empty(0), None

    def tiles(self) -> list[slice]:
        """All inputs at once while it learns."""
        return [slice(0, self.in_features)] if self.shift.requires_grad else super().tiles()

    def forward(self, dtype: torch.dtype, inputs: slice | None = None) -> Float[Tensor, "O I"]:
        """The dense weight (O, I), or the columns of one of `tiles()`, in `dtype`: what is stored, to the bit."""
        dense_OI = super().forward(dtype, inputs)
        if not (self.shift.requires_grad and torch.is_grad_enabled()):
            return dense_OI
        return cast(Tensor, _Through.apply(dense_OI, self.shift, self.axis))

    @torch.no_grad()
    def move(self, share: float) -> int:
        """Let a `share` of the sub-vectors, those of the largest shifts, take the centroids nearest to where they want.

        Where that is stays as it is. Returns how many took another one.
        """
        count = int(share * self.num_codes)
        if count == 0:
            return 0
        chosen_C = self.shift.square().sum(1).topk(count).indices
        codes_MN, centroids_MKD = self.unpacked(), self.centroids(torch.float32)
        before_MC = codes_MN[:, chosen_C]
        now_CD = torch.stack([book_KD[codes_C] for book_KD, codes_C in zip(centroids_MKD, before_MC)]).sum(0)
        wanted_CD = now_CD + self.shift[chosen_C]
        found_MC = before_MC.clone()
        for number, book_KD in enumerate(centroids_MKD):
            others_CD = now_CD - book_KD[found_MC[number]]
            found_MC[number] = nearest(wanted_CD - others_CD, book_KD)
            now_CD = others_CD + book_KD[found_MC[number]]
        moved_C = (found_MC != before_MC).any(0)
        moved = int(moved_C.sum())
        if moved:
            self.shift[chosen_C[moved_C]] = (wanted_CD - now_CD)[moved_C]
            codes_MN[:, chosen_C] = found_MC
            bits = code_bits(self.codebooks.shape[1])
            self.codes = torch.stack([pack(codes_N, bits) for codes_N in codes_MN])
        return moved


class _Through(torch.autograd.Function):
    """The dense weight (O, I) as it is; its gradient, cut into sub-vectors (N, D), is that of the shift, too."""

    @staticmethod
    def forward(ctx, dense_OI, shift_ND, axis):  # type: ignore[no-untyped-def]
        ctx.vector_dim, ctx.axis = shift_ND.shape[1], axis
        return dense_OI.view_as(dense_OI)

    @staticmethod
    def backward(ctx, grad_OI):  # type: ignore[no-untyped-def]
        return grad_OI, sub_vectors(grad_OI.float(), ctx.vector_dim, ctx.axis), None
