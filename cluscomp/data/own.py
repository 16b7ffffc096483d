"""Text that the original model itself writes: to learn from where there is no other, or beside another.

Sampled token by token from its own predictions, from the token on that begins a text (as in arXiv 2410.17170, and, of
the tokens after the first ones, in LLM-QAT, arXiv 2305.17888).
"""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from pydantic import Field, InstanceOf

from cluscomp.data.mirror import state_of
from cluscomp.data.texts import Split, Text, read_once
from cluscomp.errors import InputError
from cluscomp.settings import described, settings

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)
VERSION = 3  # of how texts are written: those of another are written anew


@runtime_checkable
class Model(Protocol):
    """Where the original comes from."""

    def folder(self, cache: Path, *, to_score: bool = False) -> Path:
        """Its folder, laid out like one of the hub."""
        ...


@settings
class OwnSamples:
    """`documents` texts of at most `length` tokens each, which the original `model` writes at a `temperature`.

    They are written once, into the folder `cache`, by the whole dense model in memory, which no plan counts; after a
    kill the next run goes on with them, to the same text. There is no test text: a model finds likely what it wrote
    itself.
    """

    name: str
    model: InstanceOf[Model]
    documents: int = Field(ge=1)
    length: int = Field(ge=2)
    temperature: float = Field(gt=0)
    batch_size: int = Field(ge=1)
    seed: int = Field(ge=0, lt=2**64)
    cache: str

    @property
    def domain(self) -> str:
        """A name of its own: no data set is learned from."""
        return self.name

    def text(self, split: Split) -> Text:
        """The texts, sampled where they are not there yet. Raises InputError for a test text: there is none."""
        if split == "test":
            raise InputError(
                f"data {self.name}: what the model itself writes is to learn from, not to be scored on; "
                "name a text to score: data@scored=pydoc"
            )
        return read_once(self, self._read)

    def _read(self) -> Text:
        from filelock import FileLock

        cache = Path(self.cache).expanduser()
        folder = self.model.folder(cache)
        content = json.dumps([state_of(folder), described(self), _arithmetic(), VERSION])
        path = cache / f"own-{hashlib.sha256(content.encode()).hexdigest()[:16]}.jsonl"
        with FileLock(f"{path}.lock"):
            if not path.is_file():
                unfinished, parts = path.with_suffix(".unfinished"), path.with_suffix(".parts")
                lines = [json.dumps({"text": text}) + "\n" for text in self._written(folder, parts)]
                unfinished.write_text("".join(lines), encoding="utf-8")
                unfinished.replace(path)
                parts.unlink()
        rows = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
        if not rows:
            raise InputError(f"data {self.name}: the model of {folder} wrote nothing but blanks; take another text")
        return Text(f"{self.name}/calibration", rows, "\n\n")

    def _written(self, folder: Path, parts: Path) -> "Iterator[str]":
        """The texts, a batch after the other; each goes into `parts` at once, with the random state after it."""
        import torch
        import transformers as known

        tokenizer = known.AutoTokenizer.from_pretrained(folder)
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if first is None:
            raise InputError(f"data {self.name}: the tokenizer of {folder} has no token that begins or ends a text")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        config = known.AutoConfig.from_pretrained(folder)
        most = getattr(config.get_text_config(), "max_position_embeddings", None)
        if most is not None and self.length > most:
            raise InputError(
                f"data {self.name}: length={self.length}: {folder.name} has {most} positions; give no more"
            )
        causal = type(config) in known.MODEL_FOR_CAUSAL_LM_MAPPING
        auto: Any = known.AutoModelForCausalLM if causal else known.AutoModelForImageTextToText
        model = auto.from_pretrained(folder, dtype=dtype, use_safetensors=True).to(device).eval()
        model.generation_config = known.GenerationConfig()  # generate() would add its file's: penalties, beams, ...
        plain = known.GenerationConfig(
            do_sample=True, temperature=self.temperature, top_k=0, top_p=1.0, max_new_tokens=self.length,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=first,
        )  # fmt: skip
        randomness: Any = torch.cuda if device.type == "cuda" else torch
        with torch.random.fork_rng(), torch.no_grad(), parts.open("ab") as kept:
            torch.manual_seed(self.seed)
            done = _whole_lines(parts)
            for part in done:
                yield from part["texts"]
            if done:
                randomness.set_rng_state(torch.frombuffer(bytearray.fromhex(done[-1]["state"]), dtype=torch.uint8))
            for start in range(len(done) * self.batch_size, self.documents, self.batch_size):
                count = min(self.batch_size, self.documents - start)
                log.info(
                    "data %s  the original writes text %d to %d of %d",
                    self.name,
                    start + 1,
                    start + count,
                    self.documents,
                )
                begun_B1 = torch.full((count, 1), first, device=device)
                seen_B1 = torch.ones_like(begun_B1)  # else transformers takes the first token for padding
                ids_BT = model.generate(begun_B1, attention_mask=seen_B1, generation_config=plain)
                texts = [*filter(str.strip, tokenizer.batch_decode(ids_BT, skip_special_tokens=True))]
                state = bytes(randomness.get_rng_state().tolist()).hex()
                kept.write(json.dumps({"texts": texts, "state": state}).encode() + b"\n")
                kept.flush()
                yield from texts


def _whole_lines(file: Path) -> list[dict[str, Any]]:
    """What is in the lines of a file of JSON; the last one goes if a killed process left it half-written."""
    whole = file.read_bytes().rpartition(b"\n")
    os.truncate(file, len(whole[0]) + len(whole[1]))
    return [json.loads(line) for line in whole[0].splitlines()]


def _arithmetic() -> list[str]:
    """What decides the samples besides model and settings."""
    import torch
    import transformers

    return [
        torch.__version__,
        transformers.__version__,
        torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    ]
