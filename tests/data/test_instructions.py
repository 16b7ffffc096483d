"""Tokens of prompts and answers where a tokenizer puts a space before every text, and where it does not."""

import itertools
import json

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cluscomp.data.instructions import Rows, _plain_context

CHAT = "{% for m in messages %}{{ '[' + m.role[0] + ']' if m.role == 'user' else '</s>' }}{{ m.content }}{% endfor %}"
SPACES = {
    "prepend": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    "replace": normalizers.Replace(" ", "▁"),
}


def letters(spaces: str) -> PreTrainedTokenizerFast:
    """A token a letter, and one for "▁y"; with "prepend" a space comes before every text, as in Llama 2."""
    names = ["<unk>", "</s>", "▁", "▁y", "\n", *"[]():?", *map(chr, range(ord("A"), ord("Z") + 1))]
    names += map(chr, range(ord("a"), ord("z") + 1))
    made = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, [("▁", "y")], unk_token="<unk>"))
    made.normalizer = SPACES[spaces]
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")


def pieces(tokenizer, form: str, row: dict, tmp_path) -> list[str]:
    """Tokens of what does not count and of what does, in turn, each token apart."""
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    file = str(tmp_path / "rows.json")
    source = Rows(name="rows", format=form, file=file, id=None, config=None, split="train", data_root=None)
    (one,) = source.encode(tokenizer, 100).examples
    tokens = zip(tokenizer.convert_ids_to_tokens(one.ids), one.counted)
    return [" ".join(token for token, _ in run) for _, run in itertools.groupby(tokens, key=lambda token: token[1])]


@pytest.mark.parametrize(
    ("prompt", "completion", "told"),
    [
        ("A:", " yes", ["▁ A :", "▁y e s </s>"]),  # one space, not two
        ("A:\n", "yes", ["▁ A : \n", "y e s </s>"]),
        ("A: ", "yes", ["▁ A : ▁", "y e s </s>"]),  # "▁y" would take the prompt's last token away
        ("A:", "no yes", ["▁ A :", "n o ▁y e s </s>"]),
    ],
)
def test_an_answer_gets_no_space_that_is_not_there(prompt, completion, told, tmp_path):
    row = {"prompt": prompt, "completion": completion}
    assert pieces(letters("prepend"), "prompt_completion", row, tmp_path) == told
    told = [told[0].removeprefix("▁ "), told[1]]
    assert pieces(letters("replace"), "prompt_completion", row, tmp_path) == told


def test_turns_of_a_conversation_are_tokenised_as_the_whole_of_it(tmp_path):
    """Also where a special token ends a turn, after which this tokenizer itself puts a space."""
    tokenizer = letters("prepend")
    tokenizer.chat_template = CHAT + "{{ '</s>' if add_generation_prompt else '' }}"
    said = [("user", "a?"), ("assistant", "yes"), ("user", "b?"), ("assistant", "no")]
    found = pieces(tokenizer, "messages", {"messages": [{"role": r, "content": c} for r, c in said]}, tmp_path)
    assert found == ["▁ [ u ] a ? </s>", "▁y e s", "[ u ] b ? </s>", "▁ n o"]
    ids = tokenizer("[u]a?</s>yes[u]b?</s>no", add_special_tokens=False).input_ids
    assert " ".join(tokenizer.convert_ids_to_tokens(ids)) == " ".join(found)


def test_pieces_stay_apart_where_that_is_right():
    """Byte-level BPE has a letter alone as it has it in a text, unless it was made to put a space before."""
    for before, found in ((False, None), (True, "a\n")):
        made = Tokenizer(models.BPE({one: n for n, one in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=before)
        assert _plain_context(PreTrainedTokenizerFast(tokenizer_object=made)) == found
    assert _plain_context(letters("replace")) is None
