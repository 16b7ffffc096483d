"""Stage evaluate: scores of the original and of the model after each named stage, each under one protocol."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, InstanceOf

from cluscomp.data.overlap import Learned, overlap
from cluscomp.data.texts import Source, test_windows
from cluscomp.errors import InputError
from cluscomp.score.tasks import Tasks, flipped
from cluscomp.settings import described, settings
from cluscomp.store.records import content_key

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from cluscomp.models.original import Original
    from cluscomp.models.walk import Walk
    from cluscomp.plan.cost import Cost
    from cluscomp.plan.meta import MetaModel
    from cluscomp.score.perplexity import Mean, Reference
    from cluscomp.store.records import Score

Answers = Sequence[dict[str, Any]]  # to tasks, row by row
TASK_TOKENS = 128  # assumed of the longest rows of tasks
LM_EVAL = 0.1 * 2**30  # bytes of RAM that lm-eval and its requests take


@dataclass(frozen=True)
class Evaluation:
    """What was found of one model: scores, all answers to the tasks, and how it continues the prompt, if any."""

    scores: "list[Score]"
    answers: Answers
    sample: str | None


@settings
class Evaluate:
    """Perplexity and bits per byte on the test texts of `texts` in windows of `context` tokens (null: the model's).

    `after` lists what is measured: "original" and names of stages; null means all of them. `limit` keeps the first so
    many windows of each text and marks the scores as partial. With `bos` the first token of every window, which is
    context only, becomes the tokenizer's BOS (as in llama.cpp). With `distance` also KL and top-1 agreement with the
    original, exact, on the same windows; its last hidden states are kept on disk for that. With a `prompt` the models
    also continue it, `prompt_tokens` long, to be looked at. `tasks` are asked through lm-eval.
    """

    texts: dict[str, InstanceOf[Source]]
    after: list[str] | None
    context: int | None = Field(ge=2)
    bos: bool
    distance: bool
    limit: int | None = Field(ge=1)
    batch_size: int = Field(ge=1)
    tasks: InstanceOf[Tasks]
    prompt: str | None
    prompt_tokens: int = Field(ge=1)

    def __post_init__(self) -> None:
        """Raises ValueError if two texts have one name: their scores could not be told apart."""
        names = [source.name for source in self.texts.values()]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"texts: two of them are named '{twice}'")

    def inputs(self) -> dict[str, str]:
        """The hashes of the test texts by name, and of what decides the tasks' scores if there are any.

        Raises InputError if the rows of one of them cannot be had.
        """
        tasks: dict[str, str] = {}
        if self.tasks.names:
            what = [described(self.tasks)["class"], self.tasks.describe(), self.tasks.rows(), lm_eval_version()]
            tasks["lm-eval tasks"] = content_key(what)
        return tasks | {source.name: source.text("test").sha256 for source in self.texts.values()}

    def without_effect(self) -> set[str]:
        """Which models are measured does not change what is measured of each; texts and tasks count by their hashes."""
        return {"after", "texts", "tasks"}

    def check(self, original: "Original") -> None:
        """Cut the windows. Raises InputError if a text is too short, a window too long, or there is no BOS."""
        if self.texts:
            original.check_length("evaluate.context", self._context(original))
        for source in self.texts.values():
            self._windows(source, original)
        if self.tasks.max_length is not None:
            original.check_length("tasks.max_length", self.tasks.max_length)
        self.tasks.check(original.folder, original.tokenizer)

    def cost(self, outline: "MetaModel") -> "Cost":
        """All windows' hidden states of one text after the other, one block, and the logits of one batch.

        A prompt and tasks want the whole original. Of tasks lm-eval and the logits of a batch of rows of `TASK_TOKENS`
        are counted, the time they take is not.
        """
        from cluscomp.kernels.work import Work
        from cluscomp.plan.cost import Cost, worst

        context = self.context or int(outline.config.get_text_config().max_position_embeddings)
        tokens = [outline.tokens(partial(source.text, "test")) for source in self.texts.values()]
        windows = [max(1, min(int(count // context), self.limit or int(count))) for count in tokens]
        once, logits = outline.forward(self.batch_size, context), outline.logits(self.batch_size, context)
        always = {"embedding, head": outline.outside, "streams": outline.stream(max(windows, default=0), context)}
        if self.distance and outline.compressed:
            always |= {"those of the original": outline.outside}
        read = outline.all_numbers * outline.file_bytes
        loading: dict[str, float] = {}
        if outline.compressed:
            always |= {"codes and codebooks": outline.stored}
            loading = {"reading": outline.reading}
            read = outline.checkpoint_bytes()
        block = {} if outline.compressed else {"a dense block": outline.dense_block}
        compared = 2 if self.distance else 1  # models whose logits are in memory
        moments = [always | loading]
        if self.texts:
            moments += [always | block | {"activations": once.peak}, always | {"logits": compared * logits.peak}]
        whole = {
            "embedding, head": outline.outside,
            "the whole original, for prompt and tasks": outline.all_numbers * outline.dtype.itemsize - outline.outside,
        }
        model = always if outline.compressed else whole
        if self.prompt is not None:
            moments.append(model)
        if self.tasks.names:
            row = TASK_TOKENS * outline.vocabulary * (outline.dtype.itemsize + 8.0)  # and their logarithms, in 32 bits
            moments.append(model | {"logits of tasks": self.tasks.batch_size * row})
        batches = sum(windows) / self.batch_size
        work = (once.work * outline.blocks + logits.work * compared) * batches + Work(read=read)
        host = {"lm-eval": LM_EVAL} if self.tasks.names else {}
        return Cost(
            worst(*moments), host, work, "evaluate.batch_size=1, a smaller evaluate.limit, or evaluate.prompt=null"
        )

    def _windows(self, source: Source, original: "Original") -> "Tensor":
        import torch

        tokenizer = original.tokenizer
        windows_WT = test_windows(source.text("test"), tokenizer, length=self._context(original), limit=self.limit)
        if self.bos:
            if tokenizer.bos_token_id is None:
                raise InputError(f"evaluate.bos=true: the tokenizer of {original.folder} has no BOS token")
            windows_WT[:, 0] = tokenizer.bos_token_id
        return torch.from_numpy(windows_WT)

    def evaluate(
        self,
        model: "PreTrainedModel | Original",
        original: "Original",
        after: str,
        learned: dict[str, Learned],
        kept: Path,
        *,
        seed: int,
        before: Answers = (),
    ) -> Evaluation:
        """Score a model, ask it the tasks and let it continue the prompt.

        Args:
            model: the model; or, of one whose blocks lie in a file, what reads them: its texts are scored block by
                block, for tasks and prompt it is loaded whole.
            original: the model before all stages, whose tokenizer, and distance from, are taken.
            after: the stage that left the model, or "original".
            learned: what each stage up to there has learned from.
            kept: a folder for what the original predicts, named by all that decides that but text and settings here.
            seed: the run's, by which stages cut what they learn from.
            before: the original's answers to the tasks, to count flips; none: no flips.
        """
        from cluscomp.models.original import Original
        from cluscomp.models.walk import Walk

        scores = []
        if self.texts:
            seen = self._seen(original, learned, seed)
            walk = Walk(model.model(), model) if isinstance(model, Original) else Walk(model)
            for source in self.texts.values():
                scores += self._scores(walk, source, original, after, kept, seen[source.name])
        if not self.tasks.names and self.prompt is None:
            return Evaluation(scores, [], None)
        whole = model.load_all() if isinstance(model, Original) else model
        asked, answers = self._ask(whole, original, after, before) if self.tasks.names else ([], [])
        return Evaluation(scores + asked, answers, self._sample(whole, original))

    def _scores(
        self, walk: "Walk", source: Source, original: "Original", after: str, kept: Path, seen: dict[str, Any]
    ) -> "list[Score]":
        import math

        from cluscomp.score.perplexity import mean_of, scored_bytes, window_scores
        from cluscomp.store.records import Score

        windows_WT = self._windows(source, original)
        label = f"{after} model on {source.name}"
        reference = self._reference(walk, windows_WT, original, after, kept) if self.distance else None
        sums = window_scores(walk, windows_WT, batch_size=self.batch_size, label=label, reference=reference)
        loss = mean_of(sums["loss"], windows_WT.shape[1] - 1)
        found: dict[str, Mean] = {
            "perplexity": loss.exp(),
            "bits_per_byte": loss.per(scored_bytes(original.tokenizer, windows_WT), math.log(2)),
        } | {name: mean_of(sums[name], windows_WT.shape[1] - 1) for name in sums if name != "loss"}
        protocol = self._protocol(walk.model, source, original, windows_WT)
        return [
            Score(
                after=after, metric=metric, dataset=source.name, value=mean.value, stderr=mean.stderr, n=mean.count,
                protocol=protocol, seen=seen,
            )
            for metric, mean in found.items()
        ]  # fmt: skip

    def _seen(self, original: "Original", learned: dict[str, Learned], seed: int) -> dict[str, dict[str, Any]]:
        """For each test text by name, and each stage that learned from text, what of the scored windows it had seen.

        The fields are those of a score's `seen`.
        """
        decode = partial(original.tokenizer.batch_decode, clean_up_tokenization_spaces=False)
        texts = {stage: decode(one.windows(original.tokenizer, seed)) for stage, one in learned.items()}
        found: dict[str, dict[str, Any]] = {}
        for source in self.texts.values():
            parts = decode(self._windows(source, original).tolist()) if learned else []
            found[source.name] = {
                stage: {
                    "text": one.name,
                    "in_domain": one.domain == source.domain,
                    "overlap": overlap(parts, texts[stage]),
                }
                for stage, one in learned.items()
            }
        return found

    def _reference(
        self, walk: "Walk", windows_WT: "Tensor", original: "Original", after: str, kept: Path
    ) -> "Reference":
        from cluscomp.models.predictions import Predictions, last_hidden
        from cluscomp.models.walk import Walk
        from cluscomp.score.perplexity import Reference
        from cluscomp.store.files import held_alone

        first = walk if after == "original" else Walk(original.model(), original)
        folder = kept / content_key([windows_WT.tolist(), self.batch_size])
        predictions = Predictions(folder, windows_WT, last_hidden)
        with held_alone(folder, "the original's predictions"):
            predictions.write(first, batch_size=self.batch_size)
        return Reference(first, predictions)

    def _ask(
        self, model: "PreTrainedModel", original: "Original", after: str, before: Answers
    ) -> "tuple[list[Score], Answers]":
        """Scores of the tasks, for each the share of answers that flipped from those `before`, and all answers."""
        from cluscomp.store.records import Score, protocol

        found, answers = self.tasks.ask(model, original.tokenizer)
        settings = {key: value for key, value in self.tasks.describe().items() if key not in {"names", "mean"}}
        common = settings | {"lm_eval": lm_eval_version(), "partial": self.tasks.limit is not None}
        scores = [
            Score(
                after=after, metric=one.metric, dataset=one.task, value=one.value, stderr=one.stderr, n=one.n,
                protocol=protocol(
                    **common | self._machine(model, original),
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

    def _sample(self, model: "PreTrainedModel", original: "Original") -> str | None:
        """What the model makes of the prompt, or None without one."""
        from cluscomp.score.perplexity import continuation

        if self.prompt is None:
            return None
        return continuation(model, original.tokenizer, self.prompt, self.prompt_tokens)

    def _context(self, original: "Original") -> int:
        return self.context or int(original.config.get_text_config().max_position_embeddings)

    def _protocol(
        self, model: "PreTrainedModel", source: Source, original: "Original", windows_WT: "Tensor"
    ) -> dict[str, Any]:
        """Everything that decides what the scores on a text mean."""
        from cluscomp.store.records import protocol

        return protocol(
            **source.text("test").describe(),
            **self._machine(model, original),
            context=self._context(original),
            stride=self._context(original),
            windows=len(windows_WT),
            partial=self.limit is not None,
            starts_with_bos=int(windows_WT[0, 0]) == original.tokenizer.bos_token_id,
            every_window_starts_with_bos=self.bos,
            average="tokens",
        )

    def _machine(self, model: "PreTrainedModel", original: "Original") -> dict[str, Any]:
        """What decides the numbers besides text and settings: tokenizer, arithmetic, versions."""
        import torch
        import transformers

        return {
            "tokenizer": content_key(sorted(original.tokenizer.get_vocab().items())),
            "dtype": str(original.dtype).removeprefix("torch."),
            "device": original.device.type,
            "attention": model.config._attn_implementation,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }


def lm_eval_version() -> str | None:
    """The installed lm-eval's version, or None."""
    import importlib.metadata

    try:
        return importlib.metadata.version("lm-eval")
    except importlib.metadata.PackageNotFoundError:
        return None
