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

From Python: `from cluscomp import compress, load, export` (api.py).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluscomp.api import compress as compress
    from cluscomp.api import export as export
    from cluscomp.api import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """What api.py gives, which is loaded when it is first named: `import cluscomp` alone loads no torch."""
    if name in ("compress", "export", "load"):
        return getattr(importlib.import_module("cluscomp.api"), name)
    raise AttributeError(f"module {__name__} has no {name}")
