"""Codebooks of the whole model trained on windows of a text: the next token, and what the original predicts."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from cluscomp.models.original import Original, norms
from cluscomp.models.predictions import Teacher
from cluscomp.models.walk import Walk
from cluscomp.train.masters import Trained
from cluscomp.train.steps import Steps
from cluscomp.train.whole import IGNORED, Example, Objective, train_whole


def train_on_text(
    model: PreTrainedModel,
    train_WT: np.ndarray,
    held_out_WT: np.ndarray,
    settings: Steps,
    *,
    cross_entropy: bool,
    teacher: Original | None,
    teacher_top: int,
    norms_too: bool,
    folder: Path,
    seed: int,
) -> dict[str, Any]:
    """Train the codebooks of a compressed model in place; returns what `train_whole` does.

    Args:
        model: the compressed model.
        train_WT: windows (W, T) of token ids for all steps, in their order.
        held_out_WT: windows that are scored before and after.
        settings: batches, learning rate and so on.
        cross_entropy: whether next-token cross-entropy counts.
        teacher: the model whose predictions are to be met (KL), or None.
        teacher_top: so many of its likeliest tokens are kept, in `folder`.
        norms_too: whether the weights of norms learn, too.
        folder: where the state lies that a killed run goes on from.
        seed: of dropout.
    """
    train, held_out = torch.from_numpy(train_WT), torch.from_numpy(held_out_WT)
    kept = None
    if teacher is not None:
        kept = Teacher(folder, torch.cat([train, held_out]), teacher_top)
        kept.write(Walk(teacher.model(), teacher), batch_size=settings.batch_size)
    trained = Trained(model, codebooks=True, others=norms(model) if norms_too else {})
    objective = Objective(
        model, trained.parameters, cross_entropy=cross_entropy, kl=teacher is not None, ids_BT=held_out[:1]
    )
    return train_whole(
        model,
        trained,
        objective,
        Windows(train, kept, 0),
        Windows(held_out, kept, len(train)),
        settings,
        tokens=train.numel(),
        name="recover",
        folder=folder,
        seed=seed,
    )


class Windows:
    """Windows (W, T) as training examples, with the teacher's predictions from its window `first` on."""

    def __init__(self, windows_WT: Tensor, teacher: Teacher | None, first: int) -> None:
        self.windows_WT, self.teacher, self.first = windows_WT, teacher, first

    def __len__(self) -> int:
        return len(self.windows_WT)

    def __getitem__(self, index: int) -> Example:
        ids_T = self.windows_WT[index]
        predictions = {} if self.teacher is None else self.teacher.window(self.first + index)
        return {"input_ids": ids_T, "labels": F.pad(ids_T[1:], (0, 1), value=IGNORED)} | predictions
