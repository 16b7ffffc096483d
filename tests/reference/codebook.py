"""A codebook weight entry by entry, and its bits as the paper counts them."""

import math

import numpy as np


def dense(codes, codebooks, out_features, in_features, axis):
    """The weight (O, I) of codes (M, N) and codebooks (M, K, D), one entry after the other."""
    num_codebooks, _, dim = codebooks.shape
    length = out_features if axis == "out" else in_features
    per_line = math.ceil(length / dim)
    weight = np.zeros((out_features, in_features))
    for o in range(out_features):
        for i in range(in_features):
            line, position = (i, o) if axis == "out" else (o, i)
            for m in range(num_codebooks):
                group = position // dim
                code = codes[m][line * per_line + group if axis == "out" else group * out_features + line]
                weight[o, i] += codebooks[m][code][position % dim]
    return weight


def bits(out_features, in_features, axis, dim, size):
    """Stored bits of one matrix: packed codes in whole groups of 8, and 16 bits for each number of the codebook."""
    lines, length = (in_features, out_features) if axis == "out" else (out_features, in_features)
    codes = lines * math.ceil(length / dim)
    width = next(width for width in range(1, 17) if 2**width >= size)
    return math.ceil(codes / 8) * 8 * width + 16 * size * dim
