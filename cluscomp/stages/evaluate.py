"""Stage evaluate: perplexity of the original and of the model after each named stage, under one protocol."""

from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, Field, InstanceOf
from pydantic.dataclasses import dataclass

from cluscomp.data import Source, test_windows

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

    from cluscomp.costs import Cost
    from cluscomp.models import Original
    from cluscomp.outline import Outline
    from cluscomp.records import Score


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class Evaluate:
    """Perplexity on the test text of `data` in windows of `context` tokens (null: as many as the model takes).

    `after` lists what is measured: "original" and names of stages; null means all of them. `limit` keeps the first so
    many windows and marks the score as partial. With a `prompt` the models also continue it, `prompt_tokens` long, to
    be looked at.
    """

    data: InstanceOf[Source]
    after: list[str] | None
    context: int | None = Field(ge=2)
    limit: int | None = Field(ge=1)
    batch_size: int = Field(ge=1)
    prompt: str | None
    prompt_tokens: int = Field(ge=1)

    def inputs(self) -> dict[str, str]:
        """The hash of the test text."""
        return {"test": self.data.text("test").sha256}

    def idle(self) -> set[str]:
        """Which models are measured does not change what is measured of each."""
        return {"after"}

    def check(self, original: "Original") -> None:
        """Cut the windows. Raises InputError if the text is too short or a window longer than the model takes."""
        original.check_length("evaluate.context", self._context(original))
        self._windows(original)

    def _windows(self, original: "Original") -> "np.ndarray":
        text = self.data.text("test")
        return test_windows(text, original.tokenizer, length=self._context(original), limit=self.limit)

    def cost(self, outline: "Outline") -> "Cost":
        """All windows' hidden states, one block, and the logits of one batch; a prompt wants the whole original."""
        from cluscomp.costs import Cost, Work, worst

        context = self.context or int(outline.config.get_text_config().max_position_embeddings)
        tokens = outline.tokens(lambda: self.data.text("test"))
        windows = max(1, min(int(tokens // context), self.limit or int(tokens)))
        once, logits = outline.forward(self.batch_size, context), outline.logits(self.batch_size, context)
        always = {"embedding, head": outline.outside, "streams": outline.stream(windows, context)}
        read = outline.all_numbers * outline.file_bytes
        loading: dict[str, float] = {}
        if outline.compressed:
            always |= {"codes and codebooks": outline.stored}
            loading = {"reading": outline.reading}
            read = outline.checkpoint_bytes()
        block = {} if outline.compressed else {"a dense block": outline.dense_block}
        moments = [always | block | {"activations": once.peak}, always | {"logits": logits.peak}, always | loading]
        if self.prompt is not None and not outline.compressed:
            whole = outline.all_numbers * outline.dtype.itemsize
            moments.append({"embedding, head": outline.outside, "the whole original, for the prompt": whole})
        work = (once.work * outline.blocks + logits.work) * (windows / self.batch_size) + Work(read=read)
        return Cost(
            worst(*moments), {}, work, "evaluate.batch_size=1, a smaller evaluate.limit, or evaluate.prompt=null"
        )

    def measure(self, model: "PreTrainedModel", original: "Original", after: str) -> "list[Score]":
        """Score a model; one whose blocks are still in the original's file is read from there block by block."""
        import torch

        from cluscomp.blocks import Walk
        from cluscomp.records import Score
        from cluscomp.scoring import perplexity

        windows = self._windows(original)
        walk = Walk(model, original if after == "original" else None)
        found = perplexity(walk, torch.from_numpy(windows), batch_size=self.batch_size, label=f"{after} model")
        return [
            Score(
                after=after,
                metric="perplexity",
                dataset=self.data.name,
                value=found.value,
                stderr=found.stderr,
                n=found.tokens,
                protocol=self._protocol(model, original, windows.shape[0], int(windows[0, 0])),
            )
        ]

    def sample(self, model: "PreTrainedModel", original: "Original", after: str) -> str | None:
        """What the model makes of the prompt, or None without one. The original is loaded whole for it."""
        from cluscomp.scoring import continuation

        if self.prompt is None:
            return None
        whole = original.load_all() if after == "original" else model
        return continuation(whole, original.tokenizer, self.prompt, self.prompt_tokens)

    def _context(self, original: "Original") -> int:
        return self.context or int(original.config.get_text_config().max_position_embeddings)

    def _protocol(
        self, model: "PreTrainedModel", original: "Original", windows: int, first_token: int
    ) -> dict[str, Any]:
        """Everything that decides what the perplexity means."""
        import torch
        import transformers

        from cluscomp.records import content_key, protocol

        tokenizer = original.tokenizer
        return protocol(
            **self.data.text("test").describe(),
            tokenizer=content_key(sorted(tokenizer.get_vocab().items())),
            context=self._context(original),
            stride=self._context(original),
            windows=windows,
            partial=self.limit is not None,
            starts_with_bos=first_token == tokenizer.bos_token_id,
            average="tokens",
            dtype=str(original.dtype).removeprefix("torch."),
            device=original.device.type,
            attention=model.config._attn_implementation,
            torch=torch.__version__,
            transformers=transformers.__version__,
        )
