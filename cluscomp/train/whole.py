"""Training of the whole model on next-token losses: transformers' Trainer over float32 masters of what is trained.

The order of the examples is the dataset's own and every step is a whole batch, so a run that was killed and goes on
from Trainer's last whole checkpoint ends with the same bits.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from cluscomp.store.records import read_sealed, write_sealed
from cluscomp.train.masters import Trained
from cluscomp.train.objective import IGNORED, Objective
from cluscomp.train.steps import Steps
from cluscomp.train.trainer import LINES, SummingTrainer, Watch, last_whole

log = logging.getLogger(__name__)
ATTEMPTS = 3  # the learning rate as given, halved, halved again

Example = dict[str, Tensor]  # input_ids (T,), labels (T,): the next token or -100, and top, top_log (T, K) of a teacher


class Examples(Protocol):
    """What is trained on, in its order, or scored."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def padded(examples: list[Example]) -> Example:
    """Stack examples of different length: tokens 0 without a label follow the shorter ones, which no token looks at."""
    fill = {"labels": IGNORED}
    return {
        key: nn.utils.rnn.pad_sequence([one[key] for one in examples], batch_first=True, padding_value=fill.get(key, 0))
        for key in examples[0]
    }


@torch.no_grad()
def held_out_loss(objective: Objective, examples: Examples, batch_size: int, device: torch.device) -> float:
    """The mean loss over all labels of the examples, in float64; the same on all processes."""
    total, count = 0.0, 0
    for start in range(0, len(examples), batch_size):
        batch = padded([examples[number] for number in range(start, min(start + batch_size, len(examples)))])
        total += float(
            objective(**{key: value.to(device) for key, value in batch.items()}, num_items_in_batch=1)["loss"]
        )
        count += int((batch["labels"] != IGNORED).sum())
    agreed = [total / count]
    broadcast_object_list(agreed)
    return agreed[0]


def train_whole(
    model: PreTrainedModel,
    trained: Trained,
    objective: Objective,
    train: Examples,
    held_out: Examples,
    settings: Steps,
    *,
    tokens: int,
    name: str,
    folder: Path,
    seed: int,
    begin: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Minimise the objective with AdamW; `train` holds the examples of all steps in their order, `tokens` in all.

    Vectors (norms) are not decayed. The held-out loss is taken before and after, then of what is stored. If a loss is
    not finite, or the held-out loss ends no lower than it began, all goes back to the start and the learning rate is
    halved, at most twice; then the start is kept. `begin` is called with the number of each step before it is made,
    from 0. Returns losses, steps and what was decided.
    """
    steps = len(train) // settings.of_a_step
    device = model.device
    PartialState(cpu=device.type == "cpu")
    if settings.gradient_checkpointing and not model.supports_gradient_checkpointing:
        log.warning("%s  %s has no gradient checkpointing: all of a pass is kept in memory", name, type(model).__name__)
    before = held_out_loss(objective, held_out, settings.batch_size, device)
    attempts = (read_sealed(folder / "attempts.json") or {"attempts": []})["attempts"]
    while len(attempts) < ATTEMPTS and not (attempts and attempts[-1]["kept"]):
        lr = settings.lr / 2 ** len(attempts)
        place = folder / f"attempt-{len(attempts)}"
        watch = Watch(name, tokens / steps, begin)
        trained.start()
        losses = _fit(
            model, trained, objective, train, settings, watch,
            tokens=tokens, steps=steps, lr=lr, folder=place, seed=seed,
        )  # fmt: skip
        reason, after = trained.finish(), math.nan
        if not math.isfinite(losses[-1]):
            reason = f"the loss of step {len(losses)} was not finite"
        elif reason is None:
            after = held_out_loss(objective, held_out, settings.batch_size, device)
            if not after < before:
                reason = f"the held-out loss ended at {after:.4f}"
        curve = [loss if math.isfinite(loss) else None for loss in losses]
        attempts.append(
            {
                "lr": lr,
                "steps": len(losses),
                "loss_first": curve[0],
                "loss_last": curve[-1],
                "losses": curve[:: -(-steps // LINES)],
                "held_out": after if math.isfinite(after) else None,
                "kept": reason is None,
                "reason": reason,
            }
        )
        if reason is not None:
            log.warning("%s  lr %.2e: %s, it began at %.4f; back to the start", name, lr, reason, before)
            trained.restore()
            if PartialState().is_main_process:
                write_sealed(folder / "attempts.json", {"attempts": attempts})
    last = attempts[-1]
    if not last["kept"]:
        log.warning("%s  no learning rate helped: the model stays as it was", name)
    return {
        "steps": steps,
        "trained_parameters": sum(parameter.numel() for parameter in trained.parameters),
        "loss_first": last["loss_first"],
        "loss_last": last["loss_last"],
        "held_out_before": before,
        "held_out_after": last["held_out"] if last["kept"] else before,
        "kept": last["kept"],
        "attempts": attempts,
    }


def _fit(
    model: PreTrainedModel,
    trained: Trained,
    objective: Objective,
    train: Examples,
    settings: Steps,
    watch: Watch,
    *,
    tokens: int,
    steps: int,
    lr: float,
    folder: Path,
    seed: int,
) -> list[float]:
    """Run Trainer to the last step or the first loss that is not finite; the loss of every step until then."""
    processes = PartialState().num_processes
    together = own = settings.own(processes)
    if objective.by_example:
        together = settings.together(model.device.type, tokens / len(train), processes)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=together,
        gradient_accumulation_steps=settings.accumulation * own // together,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(settings.schedule, settings.schedule),
        warmup_steps=round(settings.warmup * steps),
        max_grad_norm=settings.clip or 0.0,
        train_sampling_strategy="sequential",
        save_strategy="steps",
        save_steps=settings.save_every,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=True,  # experts that get no token, attention to an encoder that is not there
        use_cpu=model.device.type == "cpu",
        seed=seed % 2**32,  # NumPy, which Trainer seeds, too, takes no larger one
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # never nn.DataParallel
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trained.parameters if parameter.ndim > 1]},
        {"params": [parameter for parameter in trained.parameters if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=lr, weight_decay=settings.weight_decay
    )
    trainer = (SummingTrainer if objective.by_example else Trainer)(
        model=objective,
        args=arguments,
        train_dataset=train,
        data_collator=padded,
        optimizers=(optimizer, None),
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    whole = last_whole(folder)
    if whole is not None:
        log.info("%s  goes on after step %s", watch.name, whole.name.rpartition("-")[2])
    with objective.learning(), _rematerialised_blocks(model) if settings.gradient_checkpointing else _training(model):
        trainer.train(resume_from_checkpoint=None if whole is None else str(whole))
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    bad = next((number for number, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))
    return losses[: bad + 1]


@contextmanager
def _training(model: PreTrainedModel) -> Iterator[None]:
    """Dropout is as in the model's config, as in all training."""
    model.train()
    try:
        yield
    finally:
        model.eval()


@contextmanager
def _rematerialised_blocks(model: PreTrainedModel) -> Iterator[None]:
    """In training: keep a block's input alone for the backward pass, where transformers can do that with the model."""
    with _training(model):
        if not model.supports_gradient_checkpointing:
            yield
            return
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model.disable_input_require_grads()  # no block needs those, and GIT adds to the embedded tokens in place
        try:
            yield
        finally:
            disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
            disable()
