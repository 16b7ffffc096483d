"""Prompts and answers to finetune on, as token ids of which only the answers count. Settings for conf/instructions.

A row becomes pieces of text, each of which counts or not, and these become tokens piece by piece: so the tokens of a
prompt are those the model will see when it is asked.
"""

import hashlib
import json
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from pydantic import InstanceOf

from cluscomp.data.files import ENCODING, json_rows
from cluscomp.data.mirror import copies_told, own_cache
from cluscomp.data.texts import Source, tokenize
from cluscomp.errors import InputError
from cluscomp.settings import settings

# Stanford Alpaca's two templates
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
# LoftQ's GSM8K scripts, which the paper's code uses
STEP_BY_STEP = "\nFirst think step by step and then answer the final number.\n"
FINAL_ANSWER = "The final answer is:"

Piece = tuple[str, bool]  # text, and whether its tokens count


@plain_dataclass(frozen=True)
class Tokens:
    """Token ids of one example, and which of them the model is to predict."""

    ids: list[int]
    counted: list[bool]


@plain_dataclass(frozen=True)
class Encoded:
    """All examples of a set, how many lost their end to the greatest length, and how many of those all of the answer.

    The latter are left out.
    """

    examples: list[Tokens]
    truncated: int
    dropped: int


@runtime_checkable
class Instructions(Protocol):
    """A set of examples to finetune on."""

    name: str

    @property
    def domain(self) -> str:
        """The data set they come from; see `data.Source`."""
        ...

    def fingerprint(self) -> str:
        """A hash of all examples. Raises InputError if they cannot be read."""
        ...

    def encode(self, tokenizer: Any, length: int) -> Encoded:
        """The examples, each cut to `length` tokens. Raises InputError if they cannot be used."""
        ...


@settings
class Rows:
    """Rows of a JSON or JSON-lines `file`, or of split `split` of a Hugging Face data set `id` (or its local mirror).

    format: "alpaca" (instruction, input, output), "gsm8k" (question, answer), "prompt_completion" (prompt, completion:
    as they stand, one after the other), or "messages" (a list of role and content, put through the tokenizer's chat
    template; what the assistant says counts, unless it speaks first).
    """

    name: str
    format: Literal["alpaca", "gsm8k", "prompt_completion", "messages"]
    file: str | None
    id: str | None
    config: str | None
    split: str
    data_root: str | None

    def __post_init__(self) -> None:
        """Raises ValueError unless there is a file or an id, and not both."""
        if (self.file is None) == (self.id is None):
            raise ValueError("give either instructions.file or instructions.id")

    @property
    def domain(self) -> str:
        """The data set or the file."""
        return str(self.id or self.file)

    def fingerprint(self) -> str:
        """A hash of format and rows."""
        return hashlib.sha256(json.dumps([self.format, self._rows()], sort_keys=True, default=str).encode()).hexdigest()

    def encode(self, tokenizer: Any, length: int) -> Encoded:
        """The examples, each cut to `length` tokens. Raises InputError, with the row's number, for another form."""
        from jinja2 import TemplateError

        examples, truncated, dropped = [], 0, 0
        plain = _plain_context(tokenizer)
        for number, row in enumerate(self._rows()):
            try:
                pieces = self._pieces(row, tokenizer)
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                problem = f"{type(error).__name__}: {error}"
                raise InputError(f"{self._place}: row {number} is not of format '{self.format}' ({problem})") from error
            except (TemplateError, ArithmeticError) as error:  # it reaches for attributes, counts without end, ...
                problem = str(error).splitlines()[0]
                raise InputError(f"{self._place}: row {number} is refused by the chat template: {problem}") from error
            tokens = _tokens(pieces, tokenizer, plain, whole=self.format == "messages")
            truncated += len(tokens.ids) > length
            tokens = Tokens(tokens.ids[:length], tokens.counted[:length])
            if any(tokens.counted[1:]):
                examples.append(tokens)
            else:
                dropped += 1
        return Encoded(examples, truncated, dropped)

    @property
    def _place(self) -> str:
        return f"instructions.id={self.id}" if self.file is None else f"instructions.file={self.file}"

    @copies_told()
    def _rows(self) -> list[dict[str, Any]]:
        if self.file is not None:
            return _read_json(Path(self.file).expanduser(), self._place)
        from datasets import load_dataset
        from datasets.exceptions import DatasetNotFoundError

        assert self.id is not None
        place, cache = self.id, None
        if self.data_root is not None:
            folder = Path(self.data_root).expanduser() / self.id
            place, cache = str(folder), own_cache(folder)
        try:
            return [dict(row) for row in load_dataset(place, self.config, split=self.split, cache_dir=cache)]
        except (DatasetNotFoundError, ConnectionError, FileNotFoundError, ValueError) as error:
            raise InputError(f"{self._place}: {place} cannot be read ({str(error).splitlines()[0]})") from error

    def _pieces(self, row: dict[str, Any], tokenizer: Any) -> list[Piece]:
        if self.format == "alpaca":
            template, more = (WITH_INPUT, _text(row, "input")) if row.get("input") else (WITHOUT_INPUT, "")
            return [
                (template.format(instruction=_text(row, "instruction"), input=more), False),
                (_text(row, "output"), True),
            ]
        if self.format == "gsm8k":
            answer = _text(row, "answer").replace("####", FINAL_ANSWER)
            return [(_text(row, "question") + STEP_BY_STEP, False), (answer, True)]
        if self.format == "prompt_completion":
            return [(_text(row, "prompt"), False), (_text(row, "completion"), True)]
        for message in row["messages"]:
            if not (isinstance(message["content"], list) or message.get("tool_calls")):  # else the template knows
                _text(message, "content")
        return _turns(row["messages"], tokenizer, self._place)


@settings
class Plain:
    """The calibration text of a data source in windows, one after the other, in which every token counts."""

    name: str
    data: InstanceOf[Source]

    @property
    def domain(self) -> str:
        """That of the text."""
        return self.data.domain

    def fingerprint(self) -> str:
        """The hash of the text."""
        return self.data.text("calibration").sha256

    def encode(self, tokenizer: Any, length: int) -> Encoded:
        """Full windows of `length` tokens. Raises InputError if the text is too short for two."""
        text = self.data.text("calibration")
        ids = tokenize(text, tokenizer).tolist()
        windows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
        if len(windows) < 2:
            raise InputError(f"{text.name}: {len(ids)} tokens are too few for two windows of {length}")
        return Encoded([Tokens(window, [True] * length) for window in windows], 0, 0)


def _read_json(path: Path, place: str) -> list[dict[str, Any]]:
    """Rows of a JSON list, or of a file with one JSON object a line."""
    try:
        rows = json_rows(path.read_text(encoding=ENCODING))
    except (OSError, ValueError) as error:
        raise InputError(f"{place}: {error}") from error
    if not rows:
        raise InputError(f"{place}: no rows in it")
    return rows


def _text(row: dict[str, Any], key: str) -> str:
    """The text under a key. Raises TypeError for null or anything else that is none."""
    value = row[key]
    if not isinstance(value, str):
        raise TypeError(f"'{key}' is {json.dumps(value, default=str)[:60]}, no text")
    return value


def _turns(messages: list[dict[str, str]], tokenizer: Any, place: str) -> list[Piece]:
    """A conversation by the tokenizer's chat template; what the assistant says, with the end of its turn, counts.

    What it opens with answers nothing, and does not count.
    """
    if tokenizer.chat_template is None:
        raise InputError(f"{place}: the model's tokenizer has no chat template, so 'messages' cannot be used")

    def text(count: int, prompt: bool) -> str:
        return str(tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt))

    whole, done = text(len(messages), prompt=False), 0
    pieces: list[Piece] = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and number > 0:
            before, after = text(number, prompt=True), text(number + 1, prompt=False)
            if not (whole.startswith(after) and after.startswith(before)):
                raise InputError(f"{place}: the chat template rewrites earlier turns, so answers cannot be told apart")
            pieces += [(whole[done : len(before)], False), (whole[len(before) : len(after)], True)]
            done = len(after)
    return [*pieces, (whole[done:], False)]


def _plain_context(tokenizer: Any) -> str | None:
    """A text after which a letter is another token than alone, or None if there is none.

    So it is where a space is put before every text, as SentencePiece does: pieces alone would have one too many.
    """
    alone = _ids("b", tokenizer)
    for context in ("a\n", "a("):
        start, both = _ids(context, tokenizer), _ids(f"{context}b", tokenizer)
        if both[: len(start)] == start and both[len(start) :] != alone:
            return context
    return None


def _ids(text: str, tokenizer: Any) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return found


def _after(before: str, text: str, plain: str, tokenizer: Any) -> list[int]:
    """Tokens of a text after another, whose own tokens stay; or, where these would change, those after `plain`."""
    for context in (before, plain):
        start, both = _ids(context, tokenizer), _ids(f"{context}{text}", tokenizer)
        if both[: len(start)] == start:
            return both[len(start) :]
    return _ids(text, tokenizer)


def _tokens(pieces: list[Piece], tokenizer: Any, plain: str | None, *, whole: bool) -> Tokens:
    """Tokens piece by piece; special tokens begin and end the text unless it is `whole`, as a template made it.

    `plain`: see `_plain_context`.
    """
    ids: list[int] = []
    counted: list[bool] = []
    end, before = tokenizer.eos_token_id, ""
    for number, (text, counts) in enumerate(pieces):
        if number > 0 and plain is not None:
            found = _after(before, text, plain, tokenizer)
        else:
            found = tokenizer(text, add_special_tokens=number == 0 and not whole, verbose=False).input_ids
        before += text
        if number == 0 and not whole and found and found[-1] == end:
            found = found[:-1]
        ids += found
        counted += [counts] * len(found)
    if not whole and end is not None:
        ids.append(end)
        counted.append(True)
    return Tokens(ids, counted)
