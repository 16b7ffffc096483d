"""All figures of one experiment: what applies to its records."""

import pandas as pd
from matplotlib.figure import Figure

from cluscomp.report import by_layer, learned, pareto, plots, tables
from cluscomp.report.page import of_enough_seeds
from cluscomp.store.records import ORIGINAL, Record


def figures(records: list[Record]) -> dict[str, tuple[Figure, pd.DataFrame]]:
    """Every figure that these records fill, by its file's name, with the data it shows."""
    found: dict[str, tuple[Figure, pd.DataFrame]] = {}
    points, originals = [], []
    enough, _ = of_enough_seeds(records)
    scored = [record for record in enough if record.scores]
    texts = learned.by_text(scored) if scored else {}
    for text, same in texts.items():
        of_text = f"\nlearned from {text}" if len(texts) > 1 else ""  # panels of its own
        made, scores = pareto.pareto(same), tables.scores(same)
        scores = scores[(scores["after"] == ORIGINAL) & (scores["metric"] == tables.PERPLEXITY)]
        told = {"model": "model", "dataset": "data", "value": "value", "linear_bits_per_weight": pareto.BITS}
        scores = scores[[*told]].rename(columns=told).drop_duplicates(["model", "data"])
        points.append(made.assign(data=made["data"] + of_text))
        originals.append(scores.assign(data=scores["data"] + of_text))
    if points and len(shown := pd.concat(points)):
        before = pd.concat(originals)
        found["pareto"] = plots.pareto(shown, originals=before), pd.concat([shown, before.drop(columns=pareto.BITS)])
    layers = by_layer.layer_table(records)
    if len(layers):
        found["layers"] = plots.layers(layers), layers
    planned = tables.prediction_table(records)
    if len(planned):
        found["plan"] = plots.predictions(planned), planned
    return found
