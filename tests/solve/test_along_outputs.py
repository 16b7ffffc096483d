"""Codes and codebooks of least output error against brute force, the normal equations and GPTQ's own column rule."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import composed

from cluscomp.kernels.codes import code_bits, pack
from cluscomp.solve.along_outputs import (
    Coded,
    damped,
    descend_codes,
    feedback_codes,
    inverse_factor,
    least_squares_codebook,
    output_error,
)
from cluscomp.solve.kmeans import nearest
from cluscomp.solve.layer import Layer, Seen


def layer(inputs, outputs, seed=0, tokens=None):
    """A weight (I, O) and correlated inputs (T, I)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(inputs) + torch.rand(inputs, inputs, generator=generator)
    x_TI = torch.randn(tokens or 4 * inputs, inputs, generator=generator) @ mixing
    return torch.randn(inputs, outputs, generator=generator), x_TI


def moment_of(x_TI):
    moment = Seen({"moment"})
    for part in x_TI.split(7):
        moment.add(part)
    return moment.matrix_II


def dense(codes_IG, centroids_KD, outputs):
    return centroids_KD[codes_IG.long()].flatten(1)[:, :outputs]


def test_the_second_moment_is_that_of_all_tokens_and_its_diagonal_the_same_alone():
    _, x_TI = layer(6, 4)
    expected = (x_TI.double().T @ x_TI.double() / len(x_TI)).numpy()
    full, diagonal = Seen({"moment"}), Seen({"diagonal"})
    for part in x_TI.view(2, -1, 6).split(1):  # batches of windows
        full.add(part)
        diagonal.add(part)
    np.testing.assert_allclose(full.matrix_II, expected, rtol=1e-5)
    np.testing.assert_allclose(full.diagonal_I, expected.diagonal(), rtol=1e-5)
    np.testing.assert_allclose(diagonal.diagonal_I, expected.diagonal(), rtol=1e-5)
    with pytest.raises(ValueError, match="did not ask for 'moment'"):
        _ = diagonal.matrix_II
    with pytest.raises(ValueError, match="no calibration token"):
        _ = Seen({"moment"}).diagonal_I


def test_the_second_moment_shrinks_beside_its_diagonal_and_is_damped_on_it():
    moment_II = moment_of(layer(6, 4)[1])
    found_II, mean = damped(moment_II, 0.5, 0.25), float(moment_II.diagonal().mean())
    expected_II = 0.75 * moment_II + torch.diag(0.25 * moment_II.diagonal() + 0.5 * mean)
    torch.testing.assert_close(found_II, expected_II)
    assert torch.equal(damped(moment_II, 0.5, 0.0), damped(moment_II, 0.5))


def test_codes_of_little_text_serve_other_text_better_where_the_second_moment_shrinks():
    """Of 48 tokens of 32 inputs, judged on 40 times as many."""
    errors = {0.0: 0.0, 0.2: 0.0}
    for seed in range(5):
        weight_IO, x_TI = layer(32, 64, seed, tokens=2000)
        few_II, all_II = moment_of(x_TI[:48]), moment_of(x_TI)
        book_KD = torch.randn(16, 2, generator=torch.Generator().manual_seed(seed))
        for shrinkage in errors:
            codes_IG = feedback_codes(weight_IO, book_KD, damped(few_II, 0.01, shrinkage))
            errors[shrinkage] += output_error((dense(codes_IG, book_KD, 64) - weight_IO).T, all_II)
    assert errors[0.2] < 0.95 * errors[0.0]


def test_the_output_error_is_the_squared_error_of_the_outputs_per_token():
    weight_IO, x_TI = layer(6, 4)
    error_OI = 0.1 * torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    by_hand = float((x_TI.double() @ error_OI.double().T).square().sum() / len(x_TI))
    assert output_error(error_OI, moment_of(x_TI)) == pytest.approx(by_hand, rel=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(2, 9), st.integers(0, 99))
def test_least_squares_is_the_solution_of_the_normal_equations(inputs, outputs, dim, size, seed):
    """Against numpy on the design matrix written out: one row for each output of each token."""
    weight_IO, x_TI = layer(inputs, outputs, seed)
    groups = -(-outputs // dim)
    generator = torch.Generator().manual_seed(seed)
    codes_IG = torch.randint(size, (inputs, groups), generator=generator, dtype=torch.int32)
    start_KD = torch.randn(size, dim, generator=generator)
    moment_II = damped(moment_of(x_TI), 0.01)
    bits = code_bits(size)
    coded = Coded(weight_IO, pack(codes_IG.flatten(), bits), moment_II)
    found_KD = least_squares_codebook([coded], bits, start_KD, 200)
    root_II = np.linalg.cholesky(moment_II.double().numpy()).T  # H = R^T R
    design, target = np.zeros((inputs * outputs, size * dim)), root_II @ weight_IO.double().numpy()
    for i in range(inputs):
        for o in range(outputs):
            column = int(codes_IG[i, o // dim]) * dim + o % dim
            design[o::outputs, column] += root_II[:, i]
    best = np.linalg.lstsq(design, target.flatten(), rcond=None)[0]
    least = np.square(design @ best - target.flatten()).sum()
    reached = np.square(design @ found_KD.double().flatten().numpy() - target.flatten()).sum()
    assert reached <= least + 1e-4 * np.square(target).sum()
    unused = torch.ones(size, dtype=torch.bool)
    unused[codes_IG.flatten().long()] = False
    assert torch.equal(found_KD[unused], start_KD[unused])


def test_steps_end_where_they_gain_next_to_nothing():
    weight_IO, x_TI = layer(96, 64)
    moment_II, bits = damped(moment_of(x_TI), 0.01), code_bits(64)
    codes_IG = torch.randint(64, (96, 16), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    packed, start_KD = pack(codes_IG.flatten(), bits), weight_IO.view(-1, 4)[:64]

    def error(steps, enough=0.0):
        found_KD = least_squares_codebook([Coded(weight_IO, packed, moment_II)], bits, start_KD, steps, enough)
        return output_error((weight_IO - found_KD[codes_IG.long()].flatten(1)).T, moment_II)

    all_steps, ended, gained = error(200), error(200, 3e-3), error(0) - error(200)
    few = next(steps for steps in range(200) if error(steps) == ended)
    assert few < 60 and ended - all_steps < 0.01 * gained
    assert error(few - 1) - ended <= 3e-3 * (error(0) - ended) < error(few - 2) - error(few - 1)


def gptq_codes(weight_IO, centroids_KD, moment_II):
    """The same codes the slow way: after each input the rest of the inverse is found anew (optimal brain surgeon)."""
    weight = weight_IO.double().numpy().copy()
    centroids = centroids_KD.double().numpy()
    inputs, outputs = weight.shape
    dim = centroids.shape[1]
    open_inputs = sorted(range(inputs), key=lambda i: -float(moment_II[i, i]))
    codes = np.zeros((inputs, outputs // dim), dtype=int)
    while open_inputs:
        i = open_inputs[0]
        vectors = weight[i].reshape(-1, dim)
        codes[i] = np.square(vectors[:, None] - centroids[None]).sum(2).argmin(1)
        error = weight[i] - centroids[codes[i]].flatten()
        inverse = np.linalg.inv(moment_II.double().numpy()[np.ix_(open_inputs, open_inputs)])
        weight[open_inputs] -= np.outer(inverse[:, 0] / inverse[0, 0], error)
        open_inputs = open_inputs[1:]
    return codes


@pytest.mark.parametrize("inputs", [1, 5, 70, 130])
def test_feedback_codes_are_those_of_optimal_brain_surgery_input_by_input(inputs):
    weight_IO, x_TI = layer(inputs, 8)
    centroids_KD = torch.randn(7, 2, generator=torch.Generator().manual_seed(3))
    moment_II = damped(moment_of(x_TI), 0.01)
    codes_IG = feedback_codes(weight_IO, centroids_KD, moment_II)
    assert np.array_equal(codes_IG.numpy(), gptq_codes(weight_IO, centroids_KD, moment_II))


@pytest.mark.parametrize("outputs", [8, 7])
def test_feedback_lowers_the_output_error_also_with_padded_lines(outputs):
    weight_IO, x_TI = layer(48, outputs)
    centroids_KD = torch.randn(9, 2, generator=torch.Generator().manual_seed(3))
    moment_II = damped(moment_of(x_TI), 0.01)
    padded = torch.nn.functional.pad(weight_IO, (0, -outputs % 2))
    plain_IG = nearest(padded.view(-1, 2), centroids_KD).view(48, -1)
    feedback_IG = feedback_codes(weight_IO, centroids_KD, moment_II)
    plain, feedback = (
        output_error((dense(codes, centroids_KD, outputs) - weight_IO).T, moment_II)
        for codes in (plain_IG, feedback_IG)
    )
    assert feedback < 0.5 * plain


def test_without_correlation_feedback_codes_are_the_nearest():
    weight_IO, _ = layer(20, 6)
    centroids_KD = torch.randn(5, 3, generator=torch.Generator().manual_seed(3))
    codes_IG = feedback_codes(weight_IO, centroids_KD, torch.diag(torch.rand(20) + 0.1))
    assert torch.equal(codes_IG.flatten(), nearest(weight_IO.view(-1, 3), centroids_KD))


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 4), (9, 8), (70, 6)])
def test_descent_takes_the_best_of_all_codes_one_after_the_other(inputs, outputs):
    """Against trying every centroid in the place of every code and measuring the whole layer's error."""
    weight_IO, x_TI = layer(inputs, outputs)
    centroids_KD = torch.randn(4, 2, generator=torch.Generator().manual_seed(3))
    moment_II = damped(moment_of(x_TI), 0.01)
    codes_IG = torch.zeros(inputs, -(-outputs // 2), dtype=torch.int32)

    def error(codes) -> float:
        loss_OI = (dense(codes, centroids_KD, outputs) - weight_IO).T.double()
        return float(((loss_OI @ moment_II.double()) * loss_OI).sum())

    found_IG = descend_codes(weight_IO, codes_IG, centroids_KD, moment_II)
    assert not codes_IG.any()  # what was given stays
    for i in range(inputs):
        for group in range(codes_IG.shape[1]):
            tried = []
            for code in range(4):
                codes_IG[i, group] = code
                tried.append(error(codes_IG))
            codes_IG[i, group] = int(np.argmin(tried))
    best, found = error(codes_IG), error(found_IG)
    assert found == pytest.approx(best, rel=1e-3) and (found_IG == codes_IG).float().mean() > 0.95


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 80), st.integers(1, 9), st.integers(1, 4), st.integers(2, 9), st.integers(0, 99))
def test_descent_never_raises_the_output_error(inputs, outputs, dim, size, seed):
    weight_IO, x_TI = layer(inputs, outputs, seed)
    centroids_KD = torch.randn(size, dim, generator=torch.Generator().manual_seed(seed))
    moment_II = damped(moment_of(x_TI), 0.01)
    codes_IG = feedback_codes(weight_IO, centroids_KD, moment_II)
    errors = [output_error((dense(codes_IG, centroids_KD, outputs) - weight_IO).T, moment_II)]
    for _ in range(3):
        codes_IG = descend_codes(weight_IO, codes_IG, centroids_KD, moment_II)
        errors.append(output_error((dense(codes_IG, centroids_KD, outputs) - weight_IO).T, moment_II))
    scale = output_error(weight_IO.T, moment_II)
    assert all(after <= before + 1e-5 * scale for before, after in zip(errors, errors[1:]))
    assert codes_IG.shape == (inputs, -(-outputs // dim))


def test_inputs_never_seen_and_inputs_that_overflow():
    assert torch.equal(damped(torch.zeros(3, 3), 0.01), torch.eye(3))
    dead = torch.diag(torch.tensor([1.0, 0.0, 3.0]))
    assert float(torch.linalg.eigvalsh(damped(dead, 0.01)).min()) > 0
    for full in (True, False):
        moment = Seen({"moment"} if full else {"diagonal"})
        moment.add(torch.tensor([[1e30, 1.0]]))
        with pytest.raises(ValueError, match="the original model overflows"):
            _ = moment.diagonal_I


def test_least_squares_of_a_shared_codebook_is_the_solution_for_all_layers_together():
    """Against numpy on the design matrix of both layers, one below the other."""
    dim, size, generator = 2, 6, torch.Generator().manual_seed(0)
    start_KD, coded, designs, targets = torch.randn(size, dim, generator=generator), [], [], []
    for inputs, outputs, seed in ((5, 8, 1), (7, 6, 2)):
        weight_IO, x_TI = layer(inputs, outputs, seed)
        codes_IG = torch.randint(size, (inputs, outputs // dim), generator=generator, dtype=torch.int32)
        moment_II = damped(moment_of(x_TI), 0.01)
        coded.append(Coded(weight_IO, pack(codes_IG.flatten(), 3), moment_II))
        root_II = np.linalg.cholesky(moment_II.double().numpy()).T
        design = np.zeros((inputs * outputs, size * dim))
        for i in range(inputs):
            for o in range(outputs):
                design[o::outputs, int(codes_IG[i, o // dim]) * dim + o % dim] += root_II[:, i]
        designs.append(design)
        targets.append((root_II @ weight_IO.double().numpy()).flatten())
    design, target = np.concatenate(designs), np.concatenate(targets)
    least = np.square(design @ np.linalg.lstsq(design, target, rcond=None)[0] - target).sum()
    found_KD = least_squares_codebook(coded, 3, start_KD, 200)
    reached = np.square(design @ found_KD.double().flatten().numpy() - target).sum()
    assert reached <= least + 1e-4 * np.square(target).sum()


@pytest.mark.parametrize("inputs", [1, 5, 64, 193, 700, 1100])
def test_the_factor_of_the_inverse_is_as_near_to_the_truth_as_by_inverting(inputs):
    """U^T U H is the identity: at its worst place at most half more off than by the Cholesky factor of H's inverse."""
    generator = torch.Generator().manual_seed(inputs)
    x_TI = torch.randn(2 * inputs, inputs, generator=generator)
    moment_II = damped(x_TI.T @ x_TI, 0.01)
    before, exact_II = moment_II.clone(), moment_II.double()
    found_II = inverse_factor(moment_II)
    inverted_II = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(exact_II)), upper=True)

    def off(factor_II):
        return float((factor_II.T @ (factor_II @ exact_II) - torch.eye(inputs, dtype=torch.float64)).abs().max())

    assert off(found_II) <= max(1.5 * off(inverted_II), 1e-15) and off(found_II) < 1e-10
    assert torch.equal(found_II, found_II.triu()) and bool((found_II.diagonal() > 0).all())
    assert torch.allclose(found_II, inverted_II, rtol=1e-9, atol=1e-12 * float(inverted_II.abs().max()))
    assert torch.equal(inverse_factor(moment_II, torch.float32), found_II.float()) and torch.equal(moment_II, before)


@pytest.mark.parametrize("method", ["qtip", "gptq", "low_rank"])
def test_too_little_damping_is_told_with_the_layer(method):
    """Fewer tokens than inputs, one of which is far larger: nothing but damping makes the second moment invertible."""
    generator = torch.Generator().manual_seed(0)
    weight_OI, x_TI = torch.randn(64, 256, generator=generator), torch.randn(64, 256, generator=generator)
    x_TI[:, 5] *= 1e4
    stage = composed("data=pydoc", f"method={method}", "bits=3", "method.damping=1e-12").stages["cluster"]
    seen = Seen(stage.sees)
    seen.add(x_TI)
    layers = {"block.q": Layer(weight_OI, 0, seen, generator, 0)}
    with pytest.raises(ValueError, match=r"^block\.q: .*cannot be inverted: take a larger method\.damping"):
        list(stage.method.compress(layers))
