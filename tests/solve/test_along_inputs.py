"""Codes and codebooks along the inputs against brute force and numpy; AQLM and GPTVQ against plain K-means."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import correlated, heavy_tailed, made_by, planned, relative_error, statistic_of

from cluscomp.forms.codebook import CodebookWeight, sub_vectors
from cluscomp.methods.aqlm import Aqlm
from cluscomp.methods.gptvq import Gptvq
from cluscomp.plan import dry
from cluscomp.plan.places import Place
from cluscomp.solve import along_inputs
from cluscomp.solve.along_outputs import damped, output_error
from cluscomp.solve.kmeans import Recipe, kmeans

COMMON = {"bits": None, "allocation": "uniform", "storage": "float16", "iterations": 10, "damping": 0.01}
AQLM = COMMON | {"rounds": 4, "least_squares": 20, "beam": 1}
GPTVQ = COMMON | {"vector_dim": 4, "codebook_size": 256, "least_squares": 25}
SMOL = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576), "gate": (1536, 576), "up": (1536, 576),
        "down": (576, 1536)}  # fmt: skip
LLAMA = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096), "gate": (14336, 4096),
         "up": (14336, 4096), "down": (4096, 14336)}  # fmt: skip


def drawn(outputs, inputs, dim, size, books, seed):
    """A layer, random codes (M, J, O) and codebooks (M, K, D)."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI, x_TI = correlated(outputs, inputs, seed)
    codes = torch.randint(size, (books, -(-inputs // dim), outputs), generator=generator, dtype=torch.int32)
    centroids = torch.randn(books, size, dim, generator=generator)
    return weight_OI, damped(statistic_of(x_TI).matrix_II, 0.01), codes, centroids


cases = given(
    outputs=st.integers(1, 5),
    inputs=st.integers(1, 9),
    dim=st.integers(1, 4),
    size=st.integers(2, 6),
    books=st.integers(1, 3),
    seed=st.integers(0, 99),
)


@settings(max_examples=40, deadline=None)
@cases
def test_codes_stand_for_the_weight_that_is_stored(outputs, inputs, dim, size, books, seed):
    dim = min(dim, inputs)
    _, _, codes_MJO, books_MKD = drawn(outputs, inputs, dim, size, books, seed)
    books_MKD = books_MKD.half().float()
    stored = CodebookWeight.from_codes(
        codes_MJO.flatten(1), books_MKD, out_features=outputs, in_features=inputs, axis="in"
    )
    torch.testing.assert_close(along_inputs.dense(codes_MJO, books_MKD, inputs), stored(torch.float32).detach())


@settings(max_examples=25, deadline=None)
@cases
def test_codebooks_solve_the_normal_equations(outputs, inputs, dim, size, books, seed):
    """Against numpy on the design matrix written out: a column for each number of all codebooks."""
    dim = min(dim, inputs)
    weight_OI, moment_II, codes_MJO, books_MKD = drawn(outputs, inputs, dim, size, books, seed)
    found = along_inputs.least_squares_codebooks(weight_OI, codes_MJO, books_MKD, moment_II, 300)
    root_II = np.linalg.cholesky(moment_II.double().numpy())  # H = R R^T, so |e R|^2 is what an output loses
    design = np.zeros((outputs * inputs, books * size * dim))
    for m, o, i in itertools.product(range(books), range(outputs), range(inputs)):
        column = (m * size + int(codes_MJO[m, i // dim, o])) * dim + i % dim
        design[o * inputs : (o + 1) * inputs, column] += root_II[i]
    target = (weight_OI.double().numpy() @ root_II).flatten()
    best = np.linalg.lstsq(design, target, rcond=None)[0]
    least = np.square(design @ best - target).sum()
    reached = np.square(design @ found.double().flatten().numpy() - target).sum()
    assert reached <= least + 1e-3 * np.square(target).sum()


@settings(max_examples=25, deadline=None)
@cases
def test_a_pass_over_the_codes_takes_the_best_one_each_time(outputs, inputs, dim, size, books, seed):
    """Against trying every code in its place and measuring the whole output's error."""
    dim = min(dim, inputs)
    weight_OI, moment_II, codes_MJO, books_MKD = drawn(outputs, inputs, dim, size, books, seed)
    found = along_inputs.descend(weight_OI, codes_MJO, books_MKD, moment_II)

    def lost_O(codes):
        error_OI = (along_inputs.dense(codes, books_MKD, inputs) - weight_OI).double()
        return ((error_OI @ moment_II.double()) * error_OI).sum(1)

    slow = codes_MJO.clone()
    for j, m in itertools.product(range(codes_MJO.shape[1]), range(books)):
        losses = []
        for k in range(size):
            slow[m, j] = k
            losses.append(lost_O(slow))
        slow[m, j] = torch.stack(losses).argmin(0)
    torch.testing.assert_close(lost_O(found), lost_O(slow), rtol=1e-3, atol=1e-3)
    assert bool((lost_O(found) <= lost_O(codes_MJO) * (1 + 1e-4)).all())


@settings(max_examples=25, deadline=None)
@cases
def test_a_beam_that_keeps_everything_finds_the_best_codes_of_each_sub_vector(outputs, inputs, dim, size, books, seed):
    """Against all combinations of a sub-vector's codes; one output at a time gives the same."""
    dim = min(dim, inputs)
    weight_OI, moment_II, codes_MJO, books_MKD = drawn(outputs, inputs, dim, size, books, seed)
    found = along_inputs.descend(weight_OI, codes_MJO, books_MKD, moment_II, beam=size**books)

    def lost_O(codes):
        error_OI = (along_inputs.dense(codes, books_MKD, inputs) - weight_OI).double()
        return ((error_OI @ moment_II.double()) * error_OI).sum(1)

    slow = codes_MJO.clone()
    for j in range(codes_MJO.shape[1]):
        choices = torch.tensor(list(itertools.product(range(size), repeat=books)), dtype=torch.int32)
        losses = []
        for choice in choices:
            slow[:, j] = choice[:, None]
            losses.append(lost_O(slow))
        slow[:, j] = choices[torch.stack(losses).argmin(0)].T
    torch.testing.assert_close(lost_O(found), lost_O(slow), rtol=1e-3, atol=1e-3)
    assert found.dtype == codes_MJO.dtype


def test_outputs_searched_some_at_a_time_are_searched_alike(monkeypatch):
    weight_OI, moment_II, codes_MJO, books_MKD = drawn(7, 10, 3, 6, 2, 0)
    whole = along_inputs.descend(weight_OI, codes_MJO, books_MKD, moment_II, beam=4)
    monkeypatch.setattr(along_inputs, "CANDIDATES", 2 * 4 * 6)
    assert torch.equal(along_inputs.descend(weight_OI, codes_MJO, books_MKD, moment_II, beam=4), whole)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 70), st.integers(1, 4), st.integers(2, 6), st.integers(0, 99))
def test_feedback_over_sub_vectors_is_the_optimal_brain_surgeon(outputs, inputs, dim, size, seed):
    """The slow way in float64: for each sub-vector try all centroids, the inputs to come being at their best."""
    dim = min(dim, inputs)
    weight_OI, moment_II, _, books_MKD = drawn(outputs, inputs, dim, size, 1, seed)
    found = along_inputs.feedback_vectors(weight_OI, books_MKD[0], moment_II)
    left, book, moment = weight_OI.double().numpy().copy(), books_MKD[0].double().numpy(), moment_II.double().numpy()
    differing = 0
    for j in range(-(-inputs // dim)):
        here = np.arange(j * dim, min((j + 1) * dim, inputs))
        later = np.arange(here[-1] + 1, inputs)
        # what remains of H for the inputs at hand once the later ones answer: the Schur complement
        answer = np.linalg.solve(moment[np.ix_(later, later)], moment[np.ix_(later, here)]) if len(later) else None
        metric = moment[np.ix_(here, here)]
        if answer is not None:
            metric = metric - moment[np.ix_(here, later)] @ answer
        error = left[:, None, here] - book[None, :, : len(here)]  # (O, K, d)
        losses = np.einsum("okd,de,oke->ok", error, metric, error)
        chosen = found[j].numpy()
        differing += (losses[np.arange(outputs), chosen] > losses.min(1) * (1 + 1e-3) + 1e-6).sum()
        if answer is not None:  # go on from the codes it took, so that one tie does not spoil the rest
            left[:, later] += error[np.arange(outputs), chosen] @ answer.T
    assert differing == 0


def plain_kmeans(weight_OI, dim, size):
    points_ND = sub_vectors(weight_OI, dim, "in")
    found = kmeans(points_ND, size, Recipe(10, "kd", 1.9, move_centroids=True), torch.Generator())
    return along_inputs.dense(found.codes_N.view(1, -1, len(weight_OI)), found.centroids_KD[None], weight_OI.shape[1])


def test_aqlm_cuts_the_output_error_of_kmeans_at_the_same_bits_to_a_third():
    """The layer in the style of language models at 2 bits and codebooks: one of 256 at D = 4, two at D = 8."""
    weight_OI, x_TI = heavy_tailed()
    first = relative_error(weight_OI, plain_kmeans(weight_OI, 4, 256), x_TI)
    for dim, books in ((4, 1), (8, 2)):
        method = Aqlm(**AQLM, vector_dim=dim, codebook_size=256, codebooks=books)
        stored = made_by(method, weight_OI, statistic_of(x_TI), torch.Generator())
        assert relative_error(weight_OI, stored(torch.float32).detach(), x_TI) < first / 3
        assert stored.codebooks.shape == (books, 256, dim) and stored.axis == "in"


@pytest.mark.parametrize("storage, much", [("float16", 0.4), ("int8", 0.4)])
def test_gptvq_cuts_the_output_error_of_kmeans(storage, much):
    weight_OI, x_TI = heavy_tailed()
    errors = []
    for least_squares in (0, 25):
        method = Gptvq(**GPTVQ | {"storage": storage, "least_squares": least_squares})
        stored = made_by(method, weight_OI, statistic_of(x_TI), torch.Generator())
        errors.append(relative_error(weight_OI, stored(torch.float32).detach(), x_TI))
        assert stored.codebooks.shape == (1, 256, 4) and stored.axis == "in" and stored.storage == storage
    assert errors[1] < errors[0] < much * relative_error(weight_OI, plain_kmeans(weight_OI, 4, 256), x_TI)


@pytest.mark.parametrize("seed", range(3))
def test_codebooks_that_are_solved_for_stay_where_they_are(seed):
    """Two that are added up: what one has more and the other less changes nothing, and must not grow."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(40, 24, generator=generator)
    codes_MJO = torch.randint(0, 8, (2, 12, 40), generator=generator, dtype=torch.int32)
    books_MKD = torch.zeros(2, 8, 2)
    for _ in range(3):
        before_MKD = books_MKD
        books_MKD = along_inputs.least_squares_codebooks(weight_OI, codes_MJO, before_MKD, torch.eye(24), 20)
    torch.testing.assert_close(books_MKD, before_MKD, rtol=1e-4, atol=1e-5)


def test_every_round_of_aqlm_lowers_the_error():
    weight_OI, x_TI = heavy_tailed(128)
    errors = []
    for rounds in range(4):
        method = Aqlm(**AQLM | {"rounds": rounds}, vector_dim=8, codebook_size=64, codebooks=2)
        stored = made_by(method, weight_OI, statistic_of(x_TI), torch.Generator())
        moment_II = damped(statistic_of(x_TI).matrix_II, 0.01)
        errors.append(output_error(stored(torch.float32).detach() - weight_OI, moment_II))
    assert sorted(errors, reverse=True) == errors


def test_a_wider_beam_of_aqlm_lowers_the_error():
    weight_OI, x_TI = correlated(256, 256, 0)
    errors = []
    for beam in (1, 4, 16):
        method = Aqlm(**AQLM | {"beam": beam}, vector_dim=8, codebook_size=64, codebooks=2)
        stored = made_by(method, weight_OI, statistic_of(x_TI), torch.Generator().manual_seed(0))
        errors.append(relative_error(weight_OI, stored(torch.float32).detach(), x_TI))
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (1536, 576), (576, 1536), (4096, 4096)])
@pytest.mark.parametrize("bits, codebooks", [(4, 2), (3, 2), (2, 2), (2, 1), (3, 1)])
def test_limits_hold_on_real_shapes(shape, bits, codebooks):
    method = Aqlm(**AQLM | {"bits": float(bits)}, vector_dim=None, codebook_size=None, codebooks=codebooks)
    size = sum(planned(method, *shape).ledger().values()) / (shape[0] * shape[1])
    assert bits - 0.5 < size <= bits


@pytest.mark.parametrize("layers", [SMOL, LLAMA], ids=["SmolLM2-135M", "Llama-3-8B"])
@pytest.mark.parametrize("bits", [4.0, 3.3, 3.0, 2.3, 2.0])
@pytest.mark.parametrize("method", [Gptvq(**GPTVQ), Aqlm(**AQLM, vector_dim=8, codebook_size=256, codebooks=2)])
def test_all_layers_together_spend_what_a_block_may_take(layers, bits, method):
    method = replace(method, bits=bits, vector_dim=None, codebook_size=None, allocation="fill")
    weights = sum(outputs * inputs for outputs, inputs in layers.values())
    places = {name: Place(*shape, number) for number, (name, shape) in enumerate(layers.items())}
    stored = dry.compress(method, places, torch.float32).stored
    size = sum(sum(weight.ledger().values()) for weight in stored.values()) / weights
    assert bits - 0.02 < size <= bits


def test_aqlm_decodes_as_the_authors_package_does():
    """A layer of two codebooks of 256, by the dequantisation of the `aqlm` package."""
    inference = pytest.importorskip("aqlm.utils", reason="aqlm is not installed")
    weight_OI, x_TI = correlated(32, 48)
    method = Aqlm(**AQLM, vector_dim=8, codebook_size=256 // 8, codebooks=2)
    stored = made_by(method, weight_OI, statistic_of(x_TI), torch.Generator())
    codes_OJM = stored.unpacked().view(2, 6, 32).permute(2, 1, 0).long()
    books = stored.codebooks.detach().float()[:, :, None]  # (M, K, out_group_size, in_group_size)
    theirs = inference._dequantize_weight(codes_OJM, books, torch.ones(32, 1, 1, 1))
    torch.testing.assert_close(theirs, stored(torch.float32).detach())
