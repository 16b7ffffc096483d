"""Perplexity against transformers' own loss, its standard error by hand, and streaming against the model in memory."""

import math
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluscomp.models.original import Original
from cluscomp.models.walk import Walk
from cluscomp.score.perplexity import Mean, continuation, mean_of, scored_bytes, window_losses, window_scores


@pytest.fixture(scope="module")
def model(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def windows_WT(model):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (5, 24), generator=generator)


@pytest.fixture(scope="module")
def losses(model, windows_WT) -> list[float]:
    """Mean loss of each window as transformers computes it from labels."""
    with torch.no_grad():
        return [float(model(ids[None], labels=ids[None]).loss) for ids in windows_WT]


def perplexity(walk, windows_WT, batch_size=2) -> Mean:
    sums = window_scores(walk, windows_WT, batch_size=batch_size, label="a model")
    return mean_of(sums["loss"], windows_WT.shape[1] - 1).exp()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8])
def test_perplexity_is_that_of_transformers_loss(model, windows_WT, losses, batch_size):
    found = perplexity(Walk(model), windows_WT, batch_size=batch_size)
    assert found.value == pytest.approx(math.exp(sum(losses) / 5), rel=1e-5)
    assert found.count == 5 * 23
    deviation = math.sqrt(sum((loss - sum(losses) / 5) ** 2 for loss in losses) / 4)
    assert found.stderr == pytest.approx(deviation / math.sqrt(5) * found.value, rel=1e-3)


def test_fewer_windows_divide_by_their_own_tokens(model, windows_WT, losses):
    found = perplexity(Walk(model), windows_WT[:2], batch_size=5)
    assert found.value == pytest.approx(math.exp((losses[0] + losses[1]) / 2), rel=1e-5)
    assert found.count == 2 * 23


def test_one_window_has_no_standard_error(model, windows_WT, losses):
    found = perplexity(Walk(model), windows_WT[:1], batch_size=1)
    assert found.stderr is None and found.value == pytest.approx(math.exp(losses[0]), rel=1e-5)


def test_reading_the_blocks_from_the_file_gives_the_same_bits(tiny_folder, windows_WT):
    original = Original(tiny_folder, torch.float32, torch.device("cpu"))
    resident = perplexity(Walk(original.load_all()), windows_WT, batch_size=2)
    streamed = perplexity(Walk(original.model(), original), windows_WT, batch_size=2)
    assert streamed == resident


def test_a_uniform_guess_has_the_vocabulary_as_its_perplexity():
    """Equal logits over 7 tokens cost log 7 for each of the 3 predicted tokens; the first token costs nothing."""
    losses_B = window_losses(torch.zeros(2, 4, 7), torch.tensor([[0, 1, 2, 3], [6, 6, 6, 6]]))
    assert losses_B.dtype == torch.float64
    assert losses_B.tolist() == pytest.approx([3 * math.log(7)] * 2, rel=1e-6)


def test_a_model_that_knows_the_text_has_perplexity_one():
    ids_BT = torch.tensor([[3, 1, 2]])
    logits_BTV = torch.full((1, 3, 4), -100.0)
    logits_BTV[0, 0, 1] = logits_BTV[0, 1, 2] = 100.0  # what stands at t is said of t + 1
    assert window_losses(logits_BTV, ids_BT).tolist() == pytest.approx([0.0], abs=1e-9)


def test_a_hopeless_model_has_infinite_perplexity_instead_of_an_overflow(model, windows_WT):
    walk = Walk(model)
    walk.embed(windows_WT[:1])  # compared with the model now
    walk.logits = lambda _hidden, ids_BT: torch.full((*ids_BT.shape, 257), -1e4).scatter(
        2, ids_BT.roll(1, 1)[..., None], 1e4
    )
    assert perplexity(walk, windows_WT, batch_size=2).value == math.inf


def test_continuation_is_the_greedy_one(model, tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    ids = tokenizer("The", return_tensors="pt").input_ids
    with torch.no_grad():
        for _ in range(5):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(2)], 1)
    assert continuation(model, tokenizer, "The", 5) == tokenizer.decode(ids[0], skip_special_tokens=True)


def test_bits_per_byte_by_hand():
    """Two windows of 3 tokens that cost 6 and 12 nats, over 9 bytes: 18 nats are 18 / (9 log 2) bits a byte."""
    found = mean_of(torch.tensor([6.0, 12.0]), 3)
    assert (found.value, found.count) == (3.0, 6) and found.stderr == pytest.approx(1.0)  # means 2 and 4
    bits = found.per(9, math.log(2))
    assert bits.value == pytest.approx(18 / (9 * math.log(2))) and bits.count == 9
    assert bits.stderr == pytest.approx(1.0 * 6 / (9 * math.log(2)))


def test_bytes_are_those_of_the_predicted_text(tiny_folder):
    """In a byte tokenizer's tokens each is a byte; the first token of a window is not predicted."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    text = "An ordinary text, with its commas , and a naïve é."
    ids = torch.tensor(tokenizer(text).input_ids)
    assert len(ids) == len(text.encode())
    assert scored_bytes(tokenizer, ids[None]) == len(text.encode()) - 1
    assert scored_bytes(tokenizer, ids[:40].view(4, 10)) == 4 * 9


def test_the_logits_of_one_batch_are_gone_before_those_of_the_next(model, windows_WT):
    class Watched(Walk):
        made: weakref.ref | None = None

        def logits(self, hidden_BTH, ids_BT):
            assert self.made is None or self.made() is None
            logits_BTV = super().logits(hidden_BTH, ids_BT)
            self.made = weakref.ref(logits_BTV)
            return logits_BTV

    walk = Watched(model)
    window_scores(walk, windows_WT, batch_size=2, label="a model")
    assert walk.made is not None
