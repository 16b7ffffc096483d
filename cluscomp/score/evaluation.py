"""Scores of a model with their protocols: on windows of a text, and on tasks."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from cluscomp import ranks
from cluscomp.models.original import Original
from cluscomp.models.predictions import Predictions, last_hidden
from cluscomp.models.walk import Walk
from cluscomp.score.answers import Answers, flipped
from cluscomp.score.perplexity import Mean, Reference, mean_of, scored_bytes, window_scores
from cluscomp.score.sharing import shared_out
from cluscomp.score.tasks import Tasks, lm_eval_version
from cluscomp.store import records
from cluscomp.store.files import held_by_first
from cluscomp.store.records import Score, content_key


def walk_of(model: PreTrainedModel | Original) -> Walk:
    """The walk through a model, or through one whose blocks lie in a file, block by block."""
    return Walk(model.model(), model) if isinstance(model, Original) else Walk(model)


def whole(model: PreTrainedModel | Original) -> PreTrainedModel:
    """The model itself, in memory with all its blocks."""
    return model.load_all() if isinstance(model, Original) else model


def text_scores(
    walk: Walk,
    windows_WT: np.ndarray,
    original: Original,
    *,
    after: str,
    dataset: str,
    batch_size: int,
    kept: Path | None,
    protocol: dict[str, Any],
    seen: dict[str, Any],
) -> list[Score]:
    """Perplexity, bits per byte and, where asked for, the distance to the original on a text's windows.

    Args:
        walk: the model's.
        windows_WT: token ids (W, T).
        original: the model before all stages, whose tokenizer, and distance from, are taken.
        after: the stage that left the model, or "original".
        dataset: the text's name.
        batch_size: windows at a time.
        kept: a folder for what the original predicts, named by all that decides that but the windows; None: it is not
            compared with.
        protocol: what decides what the scores mean.
        seen: of the windows, what each stage learned from, as scores have it.
    """
    windows = torch.from_numpy(windows_WT)
    reference = None if kept is None else _reference(walk, windows, original, after, kept, batch_size)
    label = f"{after} model on {dataset}"
    sums = window_scores(walk, windows, batch_size=batch_size, label=label, reference=reference)
    loss = mean_of(sums["loss"], windows.shape[1] - 1)
    found: dict[str, Mean] = {
        "perplexity": loss.exp(),
        "bits_per_byte": loss.per(scored_bytes(original.tokenizer, windows), math.log(2)),
    } | {name: mean_of(sums[name], windows.shape[1] - 1) for name in sums if name != "loss"}
    sealed = records.protocol(**protocol)
    return [
        Score(
            after=after, metric=metric, dataset=dataset, value=mean.value, stderr=mean.stderr, n=mean.count,
            protocol=sealed, seen=seen,
        )
        for metric, mean in found.items()
    ]  # fmt: skip


def _reference(
    walk: Walk, windows_WT: Tensor, original: Original, after: str, kept: Path, batch_size: int
) -> Reference:
    first = walk if after == "original" else Walk(original.model(), original)
    folder = kept / content_key([windows_WT.tolist(), batch_size])
    predictions = Predictions(folder, windows_WT, last_hidden)
    with held_by_first(folder, "the original's predictions"):
        predictions.write(first, batch_size=batch_size)
    return Reference(first, predictions)


def task_scores(
    tasks: Tasks, model: PreTrainedModel, original: Original, *, after: str, before: Answers
) -> tuple[list[Score], Answers]:
    """Scores of the tasks, for each the share of answers that flipped from those `before`, and all answers."""
    asked = tasks.ask(model, original.tokenizer, shared_out)
    first = ranks.agreed(lambda: asked)
    assert first is not None  # lm-eval gives the first process what it found
    found, answers = first
    settings = {key: value for key, value in tasks.describe().items() if key not in {"names", "mean"}}
    common = settings | {"lm_eval": lm_eval_version(), "partial": tasks.limit is not None}
    scores = [
        Score(
            after=after, metric=one.metric, dataset=one.task, value=one.value, stderr=one.stderr, n=one.n,
            protocol=records.protocol(
                **common | arithmetic(model, original),
                task_version=one.version, task_hash=content_key(one.hash), task_shots=one.shots,
            ),
        )
        for one in found
    ]  # fmt: skip
    protocols = {score.dataset: score.protocol for score in scores}
    flips = [
        Score(
            after=after, metric="flipped", dataset=task, value=flips / count,
            stderr=(flips * (count - flips) / count**3) ** 0.5, n=count, protocol=protocols[task],
        )
        for task, (flips, count) in flipped(before, answers).items()
    ]  # fmt: skip
    return scores + flips, answers


def arithmetic(model: PreTrainedModel, original: Original) -> dict[str, Any]:
    """What decides the numbers besides text and settings: tokenizer, arithmetic, versions."""
    return {
        "tokenizer": content_key(sorted(original.tokenizer.get_vocab().items())),
        "dtype": str(original.dtype).removeprefix("torch."),
        "device": original.device.type,
        "attention": model.config._attn_implementation,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
