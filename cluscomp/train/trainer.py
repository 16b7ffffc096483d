"""transformers' Trainer as it is used here: gradients that processes add up, progress, whole checkpoints."""

import logging
import math
import shutil
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from cluscomp.process import for_tracker
from cluscomp.store.files import file_hash
from cluscomp.store.records import read_sealed, write_sealed
from cluscomp.train.sums import Sums

log = logging.getLogger(__name__)
LINES = 50  # of progress in the log
WHOLE = "whole.json"  # hashes of a Trainer checkpoint's files, written last


class SummingTrainer(Trainer):
    """Trainer, of which the gradients and loss of a step are `Sums` of parts, those of all processes.

    A part is a batch of Trainer's. Dropout is drawn anew for each, by its number. The model gives its loss for
    `num_items_in_batch`, and is not wrapped in DDP, which adds up otherwise.
    """

    def __init__(self, *, model: nn.Module, **more: Any) -> None:
        model._is_accelerate_prepared = True  # type: ignore[assignment]  # as it is
        super().__init__(model=model, **more)
        self._sums, self._part, self._of_step = Sums([*model.parameters()]), 0, torch.zeros(())

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The loss () of a part; the gradients of all parts of a step are there after its last."""
        part = self.state.global_step * self.args.gradient_accumulation_steps + self._part
        name = f"{self.args.seed} {part * self.args.world_size + self.args.process_index}"
        torch.manual_seed(int.from_bytes(sha256(name.encode()).digest()[:7]))
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._sums.add(loss)
        self._part += 1
        if self.accelerator.sync_gradients:
            self._of_step, self._part = self._sums.total(), 0
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Its share of the step's loss, which Trainer's own multiplies by the number of processes."""
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], *more: Any) -> None:
        """With the loss of the whole step as all processes found it."""
        super().log(logs | ({"loss": float(self._of_step)} if "loss" in logs else {}), *more)


class Watch(TrainerCallback):
    """A line of progress now and then, an end to training that diverges, and the mark of whole checkpoints."""

    def __init__(self, name: str, tokens_of_a_step: float, begin: Callable[[int], None] | None) -> None:
        self.name, self.tokens_of_a_step, self.begin = name, tokens_of_a_step, begin
        self.begun, self.first = time.monotonic(), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Start the clock."""
        self.begun, self.first = time.monotonic(), state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Called before every step."""
        if self.begin is not None:
            self.begin(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Called after every step, and once at the end, then without a loss."""
        logs: dict[str, float] = kwargs["logs"]
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            control.should_training_stop = True
        step, last = state.global_step, state.max_steps
        if state.is_world_process_zero and (step % -(-last // LINES) == 0 or step == last):
            of_a_step = (time.monotonic() - self.begun) / (step - self.first)
            log.info(
                "%s  step %*d/%d  loss %.4f  lr %.2e  %.0f tokens/s  %d:%02d left",
                self.name, len(str(last)), step, last, logs["loss"], logs["learning_rate"],
                self.tokens_of_a_step / of_a_step, *divmod(round(of_a_step * (last - step)), 60),
                extra=for_tracker(f"{self.name} steps", {"loss": logs["loss"], "lr": logs["learning_rate"]}, step),
            )  # fmt: skip

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Called when all files of a checkpoint are written."""
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            hashes = {path.name: file_hash(path) for path in sorted(folder.iterdir()) if path.name != WHOLE}
            write_sealed(folder / WHOLE, hashes)


def last_whole(folder: Path) -> Path | None:
    """The newest Trainer checkpoint with all its files as they were written; others are left out and told."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        hashes = read_sealed(path / WHOLE)
        try:
            if hashes and all(file_hash(path / name) == expected for name, expected in hashes.items()):
                return path
        except OSError:
            pass
        log.warning("%s is not whole: it is left out", path)
        if PartialState().is_main_process:
            shutil.rmtree(path, ignore_errors=True)
    return None
