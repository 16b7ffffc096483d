"""Stage evaluate: scores of the original and of the model after each named stage, each under one protocol."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, InstanceOf

from cluscomp.data.overlap import Learned, overlap, same_domain
from cluscomp.data.texts import Source, test_windows
from cluscomp.errors import InputError
from cluscomp.kernels.work import Work
from cluscomp.plan.cost import Cost, worst
from cluscomp.process import rank
from cluscomp.score.answers import Answers
from cluscomp.score.tasks import Tasks, lm_eval_version
from cluscomp.settings import described, settings
from cluscomp.store.records import Score, content_key

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from cluscomp.models.original import Original
    from cluscomp.plan.meta import MetaModel

TOKENS_OF_A_TEXT = 340_000  # assumed of a text that is not on this machine: WikiText-2's test set
TASK_TOKENS = 128  # assumed of the longest rows of tasks
LM_EVAL = 0.1 * 2**30  # bytes of RAM that lm-eval and its requests take


@dataclass(frozen=True)
class Evaluation:
    """What was found of one model: scores, all answers to the tasks, and how it continues the prompt, if any."""

    scores: list[Score]
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
        """Cut the windows. Raises InputError if a text is too short, a window or prompt too long, or BOS missing."""
        if self.texts:
            original.check_length("evaluate.context", self._context(original.config))
        for source in self.texts.values():
            self._windows(source, original)
        if self.tasks.max_length is not None:
            original.check_length("tasks.max_length", self.tasks.max_length)
        if self.prompt is not None:
            self._check_prompt(original, self.prompt)
        self.tasks.check(original.folder, original.tokenizer, original.positions)

    def _check_prompt(self, original: "Original", prompt: str) -> None:
        tokens = len(original.tokenizer(prompt).input_ids)
        if tokens == 0:
            raise InputError(
                f"evaluate.prompt={prompt!r}: the tokenizer of {original.folder} makes 0 tokens of it; give at least "
                "one, or evaluate.prompt=null"
            )
        whole, most = tokens + self.prompt_tokens, original.positions
        if most is not None and whole > most:
            shorter = (
                "a shorter evaluate.prompt" if tokens >= most else f"evaluate.prompt_tokens={most - tokens} or less"
            )
            raise InputError(
                f"evaluate.prompt_tokens={self.prompt_tokens}: with the prompt's {tokens} tokens {whole} in all, but "
                f"{original.folder.name} has {most} positions; give {shorter}"
            )

    def cost(self, outline: "MetaModel") -> Cost:
        """All windows' hidden states of one text after the other, one block, and the logits of one batch.

        A prompt and tasks want the whole original. Of tasks lm-eval and the logits of a batch of rows of `TASK_TOKENS`
        are counted, the time they take is not.
        """
        context = self._context(outline.config) if self.texts else 2  # where there are no windows any will do
        tokens = [_tokens(source) for source in self.texts.values()]
        windows = [max(1, min(int(count // context), self.limit or int(count))) for count in tokens]
        own = math.ceil(max(windows, default=0) / outline.ranks)
        once, logits = outline.forward(self.batch_size, context), outline.logits(self.batch_size, context)
        always = {"embedding, head": outline.outside, "streams": outline.stream(own, context)}
        if self.distance and outline.compressed:
            always |= {"those of the original": outline.outside}
        read = outline.all_numbers * outline.file_bytes
        loading: dict[str, float] = {}
        if outline.compressed:
            always |= outline.in_turn
            loading = {"reading": outline.reading}
            read = outline.checkpoint_bytes()
        block = {"rebuilt": outline.rebuilt} if outline.compressed else {"a dense block": outline.dense_block}
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
        batches = math.ceil(sum(windows) / self.batch_size / outline.ranks)
        work = (once.work * outline.blocks + logits.work * compared) * batches + Work(read=read)
        host = {"lm-eval": LM_EVAL} if self.tasks.names else {}
        return Cost(
            worst(*moments), host, work, "evaluate.batch_size=1, a smaller evaluate.limit, or evaluate.prompt=null"
        )

    def _windows(self, source: Source, original: "Original") -> np.ndarray:
        tokenizer = original.tokenizer
        windows_WT = test_windows(
            source.text("test"), tokenizer, length=self._context(original.config), limit=self.limit
        )
        if self.bos:
            if tokenizer.bos_token_id is None:
                raise InputError(f"evaluate.bos=true: the tokenizer of {original.folder} has no BOS token")
            windows_WT[:, 0] = tokenizer.bos_token_id
        return windows_WT

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
        from cluscomp.score import evaluation, perplexity

        scores = []
        if self.texts:
            seen = self._seen(original, learned, seed)
            walk = evaluation.walk_of(model)
            for source in self.texts.values():
                windows_WT = self._windows(source, original)
                protocol = source.text("test").describe() | evaluation.arithmetic(walk.model, original)
                scores += evaluation.text_scores(
                    walk,
                    windows_WT,
                    original,
                    after=after,
                    dataset=source.name,
                    batch_size=self.batch_size,
                    kept=kept if self.distance else None,
                    protocol=protocol | self._protocol(windows_WT, original),
                    seen=seen[source.name],
                )
        prompt = self.prompt if rank() == 0 else None  # what the first process makes of it is kept
        if not self.tasks.names and prompt is None:
            return Evaluation(scores, [], None)
        whole = evaluation.whole(model)
        answers: Answers = []
        sample = None
        if self.tasks.names:
            asked, answers = evaluation.task_scores(self.tasks, whole, original, after=after, before=before)
            scores += asked
        if prompt is not None:
            sample = perplexity.continuation(whole, original.tokenizer, prompt, self.prompt_tokens)
        return Evaluation(scores, answers, sample)

    def _protocol(self, windows_WT: np.ndarray, original: "Original") -> dict[str, Any]:
        """What decides besides text and machine what the scores on its windows mean."""
        return {
            "context": self._context(original.config),
            "stride": self._context(original.config),
            "windows": len(windows_WT),
            "partial": self.limit is not None,
            "starts_with_bos": int(windows_WT[0, 0]) == original.tokenizer.bos_token_id,
            "every_window_starts_with_bos": self.bos,
            "average": "tokens",
        }

    def marked(self, scores: list[dict[str, Any]], learned: dict[str, Learned]) -> list[dict[str, Any]]:
        """Scores as they are written, in-domain by the domains that texts have now, which are no part of any key."""
        domains = {source.name: source.domain for source in self.texts.values()}

        def told(stage: str, seen: dict[str, Any], dataset: str) -> dict[str, Any]:
            return seen | {"in_domain": same_domain(learned[stage].domain, domains[dataset])}

        return [
            row | {"seen": {stage: told(stage, seen, row["dataset"]) for stage, seen in row["seen"].items()}}
            if row["dataset"] in domains and row["seen"].keys() <= learned.keys()
            else row
            for row in scores
        ]

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
                    "in_domain": same_domain(one.domain, source.domain),
                    "overlap": overlap(parts, texts[stage]),
                }
                for stage, one in learned.items()
            }
        return found

    def _context(self, config: "PreTrainedConfig") -> int:
        """Tokens of a window. Raises InputError if neither the settings nor the model tell."""
        context = self.context or getattr(config.get_text_config(), "max_position_embeddings", None)
        if context is None:
            raise InputError("evaluate.context=null: this model names no longest window; give a number of tokens")
        return int(context)


def _tokens(source: Source) -> float:
    """About how many tokens a test text has, at 4 characters each; assumed where it is not on this machine."""
    try:
        rows = source.text("test").rows
    except (InputError, OSError):
        return TOKENS_OF_A_TEXT
    return sum(len(row) for row in rows) / 4
