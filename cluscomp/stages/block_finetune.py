"""Stage block_finetune: the codebooks of each block learn to reproduce the original block (paper, section 3.3)."""

import logging
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, InstanceOf
from pydantic.dataclasses import dataclass

from cluscomp.data import Source, calibration_windows

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from cluscomp.blocks import Walk
    from cluscomp.models import Original
    from cluscomp.stages import Job

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class BlockFinetune:
    """Block-wise error minimisation: mean squared error between the outputs of the compressed and the original block.

    The compressed block is fed what the compressed model makes of the text. `target` "fp_stream" (the paper) feeds the
    original block what the original model makes of it; "same_input" feeds both the same. Codes, norms and biases stay.
    """

    takes: ClassVar[str] = "compressed"
    data: InstanceOf[Source]
    samples: int = Field(ge=1)
    length: int = Field(ge=2)
    target: Literal["fp_stream", "same_input"]
    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    lr: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    schedule: Literal["constant", "cosine"]

    def inputs(self) -> dict[str, str]:
        """The hash of the calibration text."""
        return {"calibration": self.data.text("calibration").sha256}

    def idle(self) -> set[str]:
        """Every setting counts."""
        return set()

    def check(self, original: "Original") -> None:
        """Cut the windows. Raises InputError if the text is too short or a window longer than the model takes."""
        original.check_length("block_finetune.length", self.length)
        self._windows(original, seed=0)

    def _windows(self, original: "Original", seed: int) -> "np.ndarray":
        text = self.data.text("calibration")
        return calibration_windows(text, original.tokenizer, samples=self.samples, length=self.length, seed=seed)

    def run(self, model: "PreTrainedModel", job: "Job") -> dict[str, Any]:
        """Train block after block; the dense original is in memory one block at a time, beside both token streams.

        After each block the streams and its codebooks are written, so a killed run goes on from there. A block whose
        loss is not finite or ends no better than it began keeps the codebooks it had. Returns the loss of each block
        before and after, the blocks that were kept, and what text was used.
        """
        import torch

        from cluscomp.blocks import Walk
        from cluscomp.tracking import Progress

        windows = self._windows(job.original, job.seed)
        batches = torch.from_numpy(windows).to(job.original.device).split(self.batch_size)
        walk, teacher = Walk(model), Walk(job.original.model(), job.original)
        embedded = [walk.embed(ids_BT) for ids_BT in batches]
        for ids_BT in batches:
            teacher.embed(ids_BT)  # its blocks' arguments
        first, done, student_stream, original_stream = self._resume(job.folder, walk, embedded)
        progress = Progress("block_finetune", len(walk))
        if first:
            progress.skip(first)
        for index in range(first, len(walk)):
            entering = original_stream if self.target == "fp_stream" else student_stream
            with torch.no_grad(), teacher.block(index) as block:
                targets = [teacher.apply(index, block, hidden_BTH) for hidden_BTH in entering]
                if self.target == "fp_stream":
                    original_stream = targets
            student_stream, numbers = self.finetune_block(walk, index, student_stream, targets)
            done.append(numbers)
            self._save(job.folder, index, walk.blocks[index], done, student_stream, original_stream)
            kept = "  kept as it was" if numbers["kept"] else ""
            progress.step(f"loss {numbers['before']:.3e} -> {numbers['after']:.3e}{kept}")
        return {"calibration": self.data.text("calibration").describe(), "tokens": int(windows.size), "blocks": done}

    def finetune_block(
        self, walk: "Walk", index: int, entering: "list[Tensor]", targets: "list[Tensor]"
    ) -> "tuple[list[Tensor], dict[str, Any]]":
        """Train the codebooks of one block; returns its outputs (batches of (B, T, H)) and its losses.

        Training runs on float32 masters; the outputs and the loss after are those of the rounded, stored codebooks.
        """
        import torch
        import torch.nn.functional as F

        from cluscomp.models import compressed
        from cluscomp.training import fit

        block = walk.blocks[index]
        stored = [layer.stored for layer in compressed(block).values()]
        codebooks = [parameter for weight in stored for parameter in weight.parameters()]
        initial = [weight.state_dict() for weight in stored]

        def forward() -> "tuple[list[Tensor], float]":
            with torch.no_grad():
                outputs = [walk.apply(index, block, hidden_BTH) for hidden_BTH in entering]
                losses = [float(F.mse_loss(out, target).double()) for out, target in zip(outputs, targets)]
            return outputs, sum(losses) / len(losses)

        outputs, before = forward()
        for weight in stored:
            weight.loosen()  # type: ignore[operator]
        finite = fit(
            codebooks,
            lambda batch: F.mse_loss(walk.apply(index, block, entering[batch]), targets[batch]),
            len(entering),
            epochs=self.epochs,
            lr=self.lr,
            weight_decay=self.weight_decay,
            schedule=self.schedule,
        )
        for weight, state in zip(stored, initial):
            if finite:
                weight.settle()  # type: ignore[operator]
            else:
                weight.restore(state)  # type: ignore[operator]
        trained, after = forward()
        better = finite and after < before  # False for NaN, too
        if not better:
            log.warning("block %d: loss %.3e -> %.3e; it keeps the codebooks it had", index, before, after)
            for weight, state in zip(stored, initial):
                weight.restore(state)  # type: ignore[operator]
        return (trained, {"before": before, "after": after, "kept": False}) if better else (
            outputs, {"before": before, "after": before, "kept": True}
        )  # fmt: skip

    def _save(
        self, folder: "Path", index: int, block: "nn.Module", done: list[dict[str, Any]], *streams: "list[Tensor]"
    ) -> None:
        """Write the block and then, as the mark that it is done, both streams exactly as they are."""
        from cluscomp import checkpoint

        checkpoint.save_part(folder / f"block-{index:03}.safetensors", block, {})
        tensors = {
            f"{name}-{number}": hidden_BTH.contiguous().clone()
            for name, stream in zip(("student", "original"), streams)
            for number, hidden_BTH in enumerate(stream)
        }
        checkpoint.write_tensors(folder / "streams.safetensors", tensors, {"done": done})

    def _resume(
        self, folder: "Path", walk: "Walk", embedded: "list[Tensor]"
    ) -> "tuple[int, list[dict[str, Any]], list[Tensor], list[Tensor]]":
        """First block to do, losses so far, and both streams: from the files of a killed run if they are whole."""
        from cluscomp import checkpoint

        anew = 0, list[dict[str, Any]](), list(embedded), list(embedded)
        saved = checkpoint.read_tensors(folder / "streams.safetensors", str(embedded[0].device))
        if saved is None:
            return anew
        tensors, notes = saved
        done: list[dict[str, Any]] = notes["done"]
        parts = [checkpoint.read_part(folder / f"block-{index:03}.safetensors") for index in range(len(done))]
        whole = [part for part in parts if part is not None]
        if len(whole) < len(parts):
            log.warning("%s: a finished block is missing: the stage starts anew", folder)
            return anew
        for block, (layers, _) in zip(walk.blocks, whole):
            checkpoint.put_part(block, layers)
        student, original = (
            [tensors[f"{name}-{number}"] for number in range(len(embedded))] for name in ("student", "original")
        )
        return len(done), done, student, original
