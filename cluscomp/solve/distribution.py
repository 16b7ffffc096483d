"""How the entries of a weight and the codes of a codebook are distributed: what makes clustering easy or hard."""

import torch
from torch import Tensor

FAR = 6.0  # standard deviations from the mean beyond which an entry is an outlier
RARE = 0.1  # of the mean use, below which a centroid is rare


def of_entries(weight_OI: Tensor) -> dict[str, float]:
    """Kurtosis (3 for a normal distribution) and the share of entries beyond 6 standard deviations.

    Of equal entries both are 0. (Paper, section 3.1: kurtosis tells how hard a weight is to quantise.)
    """
    centred_OI = weight_OI.float() - weight_OI.float().mean()
    square_OI = centred_OI.square_()
    variance = float(square_OI.mean(dtype=torch.float64))
    if variance == 0 or bool(weight_OI.amin() == weight_OI.amax()):  # whose mean may be rounded
        return {"kurtosis": 0.0, "outliers": 0.0}
    outliers = float((square_OI > FAR**2 * variance).float().mean(dtype=torch.float64))
    return {"kurtosis": float(square_OI.square_().mean(dtype=torch.float64)) / variance**2, "outliers": outliers}


def of_codes(codes_MN: Tensor, codebook_size: int) -> dict[str, float]:
    """How M codebooks of K centroids are used by one weight, as means over them.

    `dead` and `rare` are the shares of centroids that no code, or less than a tenth of the mean number of codes, names;
    `entropy` is that of the codes in bits, at most log2(K). A centroid that is dead here may serve another weight that
    shares the codebook.
    """
    found = {"dead": 0.0, "rare": 0.0, "entropy": 0.0}
    for codes_N in codes_MN:
        counts_K = torch.bincount(codes_N, minlength=codebook_size).double()
        shares_K = counts_K / counts_K.sum()
        found["dead"] += float((counts_K == 0).double().mean())
        found["rare"] += float(((counts_K > 0) & (counts_K < RARE * counts_K.mean())).double().mean())
        found["entropy"] -= float(torch.xlogy(shares_K, shares_K).sum()) / torch.log(torch.tensor(2.0)).item()
    return {"centroids": codebook_size} | {key: value / len(codes_MN) for key, value in found.items()}
