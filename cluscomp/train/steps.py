"""How the training of a whole model goes on: batches, learning rate, processes. Settings alone, without torch."""

from typing import Literal

from pydantic import Field

from cluscomp.errors import InputError
from cluscomp.settings import settings

LOGITS = {"cpu": 2**22, "cuda": 2**26}  # numbers in the logits that are in memory at once, by device
TOGETHER = {"cpu": 0, "cuda": 2**11}  # tokens of short examples that are computed together: few keep no GPU busy


@settings
class Steps:
    """Settings that stages which train the whole model share.

    A step is `accumulation` batches of `batch_size` examples, whatever the number of processes. `warmup` is the share
    of steps in which the learning rate rises, `clip` the largest norm of the gradient. Every `save_every` steps the
    state is written that a killed run goes on from. With `gradient_checkpointing` the inputs of all blocks alone are
    kept for the backward pass and their insides made again: less memory, a quarter more time, the same numbers. Models
    for which transformers has nothing of the kind (CTRL) keep all.
    """

    batch_size: int = Field(ge=1)
    accumulation: int = Field(ge=1)
    lr: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    schedule: Literal["constant", "linear", "cosine"]
    warmup: float = Field(ge=0, lt=1)
    clip: float | None = Field(gt=0)
    save_every: int = Field(ge=1)
    gradient_checkpointing: bool

    @property
    def of_a_step(self) -> int:
        """Examples of one step."""
        return self.batch_size * self.accumulation

    def together(self, device: str, tokens: float, processes: int) -> int:
        """How many of its examples of a batch, of so many tokens, a process computes together, where they may be apart.

        One, if a device does as well with one: then what is learned does not depend on the number of processes.
        """
        own = self.own(processes)
        return max((n for n in range(1, own + 1) if own % n == 0 and n * tokens <= TOGETHER[device]), default=1)

    def own(self, processes: int) -> int:
        """How many examples of a batch are one process'."""
        return max(1, self.batch_size // processes)

    def state(self, together: int, processes: int) -> float:
        """Bytes of a number that learns as a float32 master: itself, gradient, sums of gradients and AdamW's state."""
        return 16.0 if together * processes >= self.of_a_step else 24.0

    def without_effect(self) -> set[str]:
        """How often the state is written, and what of a pass is kept, change no result."""
        return {"save_every", "gradient_checkpointing"}

    def check_processes(self, processes: int) -> None:
        """Raise InputError if a batch cannot be shared out evenly among the processes of a run."""
        if self.batch_size % processes:
            stage = type(self).__module__.rpartition(".")[2]
            raise InputError(f"{stage}.batch_size={self.batch_size} is no multiple of {processes} processes")
