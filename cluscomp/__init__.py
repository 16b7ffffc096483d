"""Compression of language models with codebooks, as a reproducible experiment framework.

Method: "ClusComp: A Simple Paradigm for Model Compression and Efficient Finetuning" (arXiv 2503.13089).

Shape letters, used as suffixes of tensor names everywhere:

====== =================================  ====== =================================
letter meaning                            letter meaning
====== =================================  ====== =================================
B      batch (windows)                    N      sub-vectors of one weight
T      tokens of a window                 D      length of a sub-vector (paper: g)
H      hidden size                        K      centroids of a codebook (paper: n)
O      out features                       M      codebooks added together
I      in features                        W      windows of a data set
====== =================================  ====== =================================
"""

__version__ = "0.1.0"
