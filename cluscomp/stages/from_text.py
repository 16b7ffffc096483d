"""What stages that learn from windows of a calibration text have in common."""

from typing import TYPE_CHECKING, Any

from pydantic import Field, InstanceOf

from cluscomp.data.overlap import Learned
from cluscomp.data.texts import Source, Tokenizer, calibration_windows, split, test_windows
from cluscomp.kernels.work import Work
from cluscomp.process import processes
from cluscomp.settings import settings
from cluscomp.train.steps import LOGITS, Steps

if TYPE_CHECKING:
    import numpy as np

    from cluscomp.models.original import Original
    from cluscomp.plan.cost import Cost
    from cluscomp.plan.meta import MetaModel

HELD_OUT_SHARE = 0.1  # of the calibration text's characters, from its end


@settings
class FromText:
    """Settings of a stage that learns from `samples` random windows of `length` tokens of the calibration text."""

    data: InstanceOf[Source]
    samples: int = Field(ge=1)
    length: int = Field(ge=2)

    def windows(self, tokenizer: Tokenizer, seed: int) -> "np.ndarray":
        """The windows as token ids, (W, T) int64. Raises InputError if the text is too short."""
        text = self.data.text("calibration")
        return calibration_windows(text, tokenizer, samples=self.samples, length=self.length, seed=seed)

    def learns_from(self) -> Learned | None:
        """The windows; see `Stage.learns_from`."""
        text = self.data.text("calibration")
        return Learned(
            text.name, self.data.domain, text.sha256, lambda tokenizer, seed: self.windows(tokenizer, seed).tolist()
        )

    def check(self, original: "Original") -> None:
        """Cut the windows. Raises InputError if the text is too short or a window longer than the model takes."""
        stage = type(self).__module__.rpartition(".")[2]
        original.check_length(f"{stage}.length", self.length)
        self.windows(original.tokenizer, seed=0)


@settings
class TrainsOnText(Steps):
    """Settings of a stage that trains the whole model on `tokens` tokens of the calibration text.

    In random windows of `length`. The end of the text is held out: `held_out` windows of it are scored before and
    after, and training that does not lower that loss is taken back.
    """

    data: InstanceOf[Source]
    tokens: int = Field(ge=1)
    length: int = Field(ge=2)
    held_out: int = Field(ge=1)

    def __post_init__(self) -> None:
        """Raises ValueError if the tokens do not make one step."""
        if self.samples == 0:
            raise ValueError(
                f"tokens={self.tokens} do not make one step of {self.accumulation} x {self.batch_size} windows "
                f"of {self.length} tokens"
            )

    @property
    def samples(self) -> int:
        """Windows of all steps; what is left of the tokens is not used."""
        return self.tokens // self.length // self.of_a_step * self.of_a_step

    def learns_from(self) -> Learned | None:
        """The windows it trains on; see `Stage.learns_from`."""
        text = self.data.text("calibration")

        def windows(tokenizer: Tokenizer, seed: int) -> list[list[int]]:
            return list(self.train_and_held_out(tokenizer, seed)[0].tolist())

        return Learned(text.name, self.data.domain, text.sha256, windows)

    def check(self, original: "Original") -> None:
        """Cut the windows. Raises InputError if the text is too short or a window longer than the model takes."""
        stage = type(self).__module__.rpartition(".")[2]
        self.check_processes(processes())
        original.check_length(f"{stage}.length", self.length)
        self.train_and_held_out(original.tokenizer, seed=0)

    def train_and_held_out(self, tokenizer: Tokenizer, seed: int) -> "tuple[np.ndarray, np.ndarray]":
        """Windows (W, T) to train on, in their order, and held-out ones."""
        text, held_out = split(self.data.text("calibration"), HELD_OUT_SHARE)
        train = calibration_windows(text, tokenizer, samples=self.samples, length=self.length, seed=seed)
        return train, test_windows(held_out, tokenizer, length=self.length, limit=self.held_out)

    def training_cost(
        self,
        outline: "MetaModel",
        trained: float,
        *,
        before: Work | None = None,
        passes: int = 1,
        by_example: bool = True,
    ) -> "Cost":
        """What it takes to train so many numbers of the whole model, each window going through it `passes` times.

        Raises InputError if so many ranks cannot share a batch.
        """
        self.check_processes(outline.ranks)
        together, state = self.own(outline.ranks), 16.0
        if by_example:
            together = self.together(outline.device, self.length, outline.ranks)
            state = self.state(together, outline.ranks)
        return outline.end_to_end(
            together=together,
            of_a_step=passes * self.of_a_step,
            length=self.length,
            examples=passes * self.samples,
            held_out=self.held_out,
            trained=trained,
            state=state * trained,
            logits=LOGITS[outline.device],
            again=self.gradient_checkpointing,
            before=before or Work(),
        )

    def told(self, train_WT: "np.ndarray", held_out_WT: "np.ndarray") -> dict[str, Any]:
        """What the record says of windows (W, T) that were trained on, and of those held out."""
        text = self.data.text("calibration").describe()
        return {"calibration": text, "tokens": train_WT.size, "held_out_tokens": held_out_WT.size}
