"""Codes, codebooks and bits for a weight: tensors only, no model, no settings, no file.

A module is loaded when it is first named (`solve.shapes.fixed(...)`), so that settings of methods, which name it, are
checked before torch is there.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluscomp.solve import allocate as allocate
    from cluscomp.solve import along_inputs as along_inputs
    from cluscomp.solve import along_outputs as along_outputs
    from cluscomp.solve import beside as beside
    from cluscomp.solve import groups as groups
    from cluscomp.solve import in_turn as in_turn
    from cluscomp.solve import kmeans as kmeans
    from cluscomp.solve import lattice as lattice
    from cluscomp.solve import on_grids as on_grids
    from cluscomp.solve import shapes as shapes
    from cluscomp.solve import signs as signs
    from cluscomp.solve import trellis as trellis
    from cluscomp.solve import turned as turned
    from cluscomp.solve import water_filling as water_filling
    from cluscomp.solve import widths as widths


def __getattr__(name: str) -> ModuleType:
    if name.startswith("_"):
        raise AttributeError(name)
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"module {__name__} has no {name}") from error
