"""The paper's way to run K-means and to store a codebook, as settings, and the settings of a stage without data."""

from cluscomp.data.texts import PydocText
from cluscomp.methods.beside import Beside
from cluscomp.stages.allocation import Allocation

PAPER = {"init": "random_points", "over_relaxation": 1.0, "move_centroids": False}
STORED = {"axis": "out", "storage": "float16", "share": "none", "allocation": "uniform", "floor": 0.0, "measure": True}
NO_DATA = {
    "weighting": "none",
    "assign": "nearest",
    "damping": 0.01,
    "shrinkage": 0.0,
    "least_squares": 0,
    "descent": 0,
}
IDLE = {
    "beside": Beside(keep=1.0, of=None, rank=None, rank_share=None, saliency="none", adapter_bits=16, damping=0.01),
    "allocation": Allocation(scope="block"),
    "data": PydocText(name="pydoc"),
    "samples": 1,
    "length": 8,
    "batch_size": 1,
    "prefix": "original",
    "statistics": 8.0,
    "drift": 0.0,
    "drift_damping": 0.1,
    "price": "error",
    "rotation": "none",
}
