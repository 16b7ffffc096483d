"""All figures of one experiment: what applies to its records."""

import pandas as pd
from matplotlib.figure import Figure

from cluscomp.report import by_layer, pareto, plots, tables
from cluscomp.store.records import ORIGINAL, Record


def figures(records: list[Record]) -> dict[str, tuple[Figure, pd.DataFrame]]:
    """Every figure that these records fill, by its file's name, with the data it shows."""
    found: dict[str, tuple[Figure, pd.DataFrame]] = {}
    points = pareto.pareto(records)
    if len(points):
        scores = tables.scores(records)
        originals = scores[(scores["after"] == ORIGINAL) & (scores["metric"] == "perplexity")]
        originals = originals[["dataset", "value"]].rename(columns={"dataset": "data"}).drop_duplicates("data")
        found["pareto"] = plots.pareto(points, originals=originals), pd.concat([points, originals])
    layers = by_layer.layer_table(records)
    if len(layers):
        found["layers"] = plots.layers(layers), layers
    planned = tables.prediction_table(records)
    if len(planned):
        found["plan"] = plots.predictions(planned), planned
    return found
