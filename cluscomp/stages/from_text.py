"""What stages that learn from windows of a calibration text have in common."""

from typing import TYPE_CHECKING

from pydantic import Field, InstanceOf

from cluscomp.data.overlap import Learned
from cluscomp.data.texts import Source, Tokenizer, calibration_windows
from cluscomp.settings import settings

if TYPE_CHECKING:
    import numpy as np

    from cluscomp.models.original import Original


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
