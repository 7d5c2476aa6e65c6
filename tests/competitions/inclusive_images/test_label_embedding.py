"""Label vectors, compared with dense float64 and with values worked out by hand, and on degenerate inputs."""

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from common.errors import UserError
from competitions.inclusive_images import label_embedding, spectrum
from competitions.inclusive_images.label_embedding import LabelEmbedding


def topics(images: int = 3000, labels: int = 60, groups: int = 6, seed: int = 0) -> csr_matrix:
    """Labels of images with one topic each: labels of that topic, and in a tenth of the images one random label."""
    rng = np.random.default_rng(seed)
    dense = np.zeros((images, labels), np.uint8)
    size = labels // groups
    for row in range(images):
        topic = rng.integers(groups)
        inside = topic * size + np.minimum(rng.zipf(1.5, rng.integers(1, 5)) - 1, size - 1)
        dense[row, inside] = 1
        dense[row, rng.integers(labels)] |= rng.random() < 0.1
    return csr_matrix(dense)


def slow_matrix(labels: csr_matrix, kind: str, smoothing: float = 0.0):
    """The matrix that is factored, entry by entry in float64."""
    dense = labels.toarray().astype(float)
    n, m = dense.shape
    result = np.zeros((m, m))
    for i in range(m):
        for j in range(m):
            both = (dense[:, i] * dense[:, j]).sum()
            expected = dense[:, i].sum() * dense[:, j].sum() / n
            if kind == "pmi":
                result[i, j] = np.log((both / n) / (expected / n)) if both and i != j else 0.0
            elif both:
                result[i, j] = max(0.0, np.log((both + smoothing) / (expected + smoothing)))
    return result


@pytest.mark.parametrize("smoothing", [0, 0.5, 1])
def test_ppmi_equals_the_slow_loop(smoothing):
    labels = topics(300, 20)
    found = label_embedding.ppmi(labels, smoothing)
    assert np.abs(found - slow_matrix(labels, "ppmi", smoothing)).max() < 1e-5
    assert (found == found.T).all()


def test_hand_example():
    # a and b always together in half of the images, c alone in the other half: PMI(a, b) = ln(.5 / .25) = ln 2.
    labels = csr_matrix(np.array([[1, 1, 0], [0, 0, 1]] * 5, np.uint8))
    found = LabelEmbedding.fit(labels, 3, smoothing=0)
    products = found.vectors @ found.vectors.T
    ln2 = np.log(2)
    assert products == pytest.approx(np.array([[ln2, ln2, 0], [ln2, ln2, 0], [0, 0, ln2]]), abs=1e-6)
    assert found.vectors.any(0).tolist() == [True, True, False]


def test_inner_products_are_the_matrix_when_nothing_is_cut():
    labels = topics()
    found = LabelEmbedding.fit(labels, 60, smoothing=1.0)
    wanted = slow_matrix(labels, "ppmi", 1.0)
    values, vectors = np.linalg.eigh(wanted)
    nearest_possible = (vectors * np.maximum(values, 0)) @ vectors.T
    products = found.vectors @ found.vectors.T
    assert np.abs(products - nearest_possible).max() < 1e-5, "the best positive semidefinite approximation"
    assert np.linalg.norm(products - wanted) < 0.1 * np.linalg.norm(wanted)


def test_the_blogs_matrix_is_kept_exactly_and_loses_the_sign_of_half_its_spectrum():
    labels = topics()
    found = LabelEmbedding.fit(labels, 60, kind="pmi")
    wanted = slow_matrix(labels, "pmi")
    left, sizes, _ = np.linalg.svd(wanted)
    products = found.vectors @ found.vectors.T
    assert np.abs(products - (left * sizes) @ left.T).max() < 1e-4, "E = U sqrt(S) of the singular value decomposition"
    blog_error = np.linalg.norm(products - wanted) / np.linalg.norm(wanted)
    ppmi_matrix = slow_matrix(labels, "ppmi")
    ppmi = LabelEmbedding.fit(labels, 60, smoothing=0).vectors
    assert blog_error > 0.5 > 0.1 > np.linalg.norm(ppmi @ ppmi.T - ppmi_matrix) / np.linalg.norm(ppmi_matrix)


def test_related_labels_are_nearer_than_others():
    found = LabelEmbedding.fit(topics(), 12)
    units = found.unit_vectors
    cosines = units @ units.T
    topic = found.known // 10
    same = (topic[:, None] == topic) & ~np.eye(len(topic), dtype=bool)
    assert cosines[same].mean() > 3 * abs(cosines[topic[:, None] != topic].mean())


def test_equal_input_gives_equal_bits_and_fixed_signs():
    labels = topics()
    first, second = LabelEmbedding.fit(labels, 20), LabelEmbedding.fit(labels.copy(), 20)
    assert first.vectors.tobytes() == second.vectors.tobytes()
    largest = np.abs(first.vectors).argmax(0)
    assert (first.vectors[largest, np.arange(20)] > 0).all()


@pytest.mark.parametrize("by_magnitude", [False, True])
def test_truncated_solver_against_dense_float64(by_magnitude):
    rng = np.random.default_rng(0)
    order, count = 1500, 96
    basis = np.linalg.qr(rng.standard_normal((order, order)))[0]
    values = 50 * np.exp(-np.arange(order) / 60) * (rng.choice([-1, 1], order) if by_magnitude else 1)
    matrix = (basis * values) @ basis.T
    found, vectors = spectrum.leading_eigenpairs(torch.from_numpy(matrix.astype(np.float32)), count, by_magnitude)
    assert order > 3 * (count + spectrum.GUARD) and order > spectrum.SMALL, "else the dense solver is tested"
    wanted, exact = np.linalg.eigh(matrix)
    top = np.argsort(-np.abs(wanted) if by_magnitude else -wanted)[:count]
    assert np.abs(found.numpy() - wanted[top]).max() < 1e-4
    assert (vectors.T @ vectors - torch.eye(count)).norm() < 1e-10
    outside = exact[:, top] - vectors.numpy() @ (vectors.numpy().T @ exact[:, top])
    assert np.linalg.norm(outside, 2) < 1e-3, "sine of the largest angle between the subspaces"


def test_degenerate_spectrum_does_not_break_the_solver():
    values, vectors = spectrum.leading_eigenpairs(torch.eye(1400), 32)
    assert (values - 1).abs().max() < 1e-5 and (vectors.T @ vectors - torch.eye(32)).norm() < 1e-8


def test_labels_of_few_images_get_no_vector():
    labels = topics(2000)
    counts = np.asarray(labels.sum(0, dtype=int)).ravel()
    rare = int(np.median(counts))
    found = LabelEmbedding.fit(labels, 10, least_images=rare)
    assert set(found.known) <= set(np.flatnonzero(counts >= rare)) and len(found.known) >= 25
    assert not set(LabelEmbedding.fit(labels, 10, least_images=1).known) <= set(found.known)


def test_projections_are_cosines_when_nothing_is_cut_and_smaller_when_something_is():
    labels = topics(2000)
    whole, cut = LabelEmbedding.fit(labels, 60), LabelEmbedding.fit(labels, 6)
    lengths = np.linalg.norm(whole.vectors[whole.known], axis=1)
    positive = whole.vectors.any(0).all()
    assert np.abs(whole.projections - whole.unit_vectors).max() < (0.01 if positive else 0.2)
    assert (lengths > 0.9 * whole.lengths[whole.known]).all()
    norms = np.linalg.norm(cut.projections, axis=1)
    assert (norms <= 1 + 1e-5).all() and norms.min() < 0.7


def test_labels_never_seen_are_kept_out_and_mapped():
    dense = topics(500, 12, 3).toarray()
    wide = np.zeros((500, 20), np.uint8)
    places = np.array([19, 1, 2, 3, 5, 6, 8, 9, 11, 12, 14, 17])
    wide[:, places] = dense
    narrow, found = LabelEmbedding.fit(csr_matrix(dense), 8), LabelEmbedding.fit(csr_matrix(wide), 8)
    assert set(found.known) <= set(places)
    # The columns are in another order, which may change signs and rounding of the vectors but not inner products.
    assert np.abs(found.vectors[places] @ found.vectors[places].T - narrow.vectors @ narrow.vectors.T).max() < 1e-4


def test_odd_inputs_never_give_nan():
    rng = np.random.default_rng(0)
    once = csr_matrix(np.eye(5, dtype=np.uint8))
    rare = csr_matrix((rng.random((200, 30)) < 0.02).astype(np.uint8))
    for labels, dim in ((once, 3), (once, 50), (rare, 100)):
        found = LabelEmbedding.fit(labels, dim, least_images=1)
        assert found.vectors.shape == (labels.shape[1], dim) and np.isfinite(found.vectors).all()
        assert found.vectors.any(0).sum() <= labels.shape[1]
    with pytest.raises(UserError, match="all images alike"):
        LabelEmbedding.fit(csr_matrix(np.ones((20, 4), np.uint8)), 2)
    with pytest.raises(UserError, match="no label has 1 of the 20 images"):
        LabelEmbedding.fit(csr_matrix((20, 4), dtype=np.uint8), 2)
    with pytest.raises(UserError, match="no label has 1 of the 0 images"):
        LabelEmbedding.fit(csr_matrix((0, 4), dtype=np.uint8), 2)
    with pytest.raises(UserError, match="no label has 3 of the 5 images"):
        LabelEmbedding.fit(once, 2, least_images=3)
