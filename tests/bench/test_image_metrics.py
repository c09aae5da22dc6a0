"""Distances between sets of pictures against closed forms of Gaussians, other formulas, and each other."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from manylora.bench.image.intervals import (
    Interval,
    difference_interval,
    frechet_interval,
    kid_interval,
    mean_interval,
    rms_interval,
)
from manylora.bench.image.metrics import (
    diversity,
    frechet_distance,
    frechet_extrapolated,
    gaussian_distance,
    kid,
    kid_of_subsets,
    prompt_hits,
    squared_distances,
    within_manifold,
)
from manylora.errors import ConfigError

DRAW = np.random.default_rng(0)


def normal(num, width, mean=0.0, spread=1.0, seed=0):
    return mean + spread * np.random.default_rng(seed).standard_normal((num, width))


def exact_moments(num, mean, cov, seed=0):
    """Rows whose sample mean and covariance are the given ones, to rounding."""
    x = normal(num, len(mean), seed=seed)
    x = x - x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return np.asarray(mean) + x @ np.linalg.cholesky(cov).T


def random_covariance(width, seed):
    factor = normal(width, width, seed=seed)
    return factor @ factor.T + 0.1 * np.eye(width)


def kid_by_loops(x, y):
    """The definition, picture by picture."""

    def kernel(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    def within(rows):
        values = [kernel(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
        return sum(values) / len(values)

    across = [kernel(a, b) for a in x for b in y]
    return within(x) + within(y) - 2 * sum(across) / len(across)


def test_kid_is_its_definition():
    x, y = normal(7, 3), normal(9, 3, mean=0.4, seed=1)
    assert kid(x, y) == pytest.approx(kid_by_loops(x.tolist(), y.tolist()), rel=1e-12)


def test_kid_has_no_bias():
    """The mean over many draws of equal laws is 0, and of a shifted law its MMD, whose closed form is below."""
    equal = [kid(normal(20, 2, seed=i), normal(20, 2, seed=1000 + i)) for i in range(400)]
    assert abs(np.mean(equal)) < 4 * np.std(equal) / 20
    assert np.std(equal) > 0
    shifted = [kid(normal(20, 1, mean=0.5, seed=i), normal(20, 1, seed=1000 + i)) for i in range(400)]
    # k = (xy + 1)^3: MMD^2 = sum over p of binomial(3, p) (E x^p - E y^p)^2, with E x, x^2, x^3 of N(0.5, 1).
    wanted = 3 * 0.5**2 + 3 * 0.25**2 + (0.5**3 + 3 * 0.5) ** 2
    assert abs(np.mean(shifted) - wanted) < 4 * np.std(shifted) / 20
    assert wanted > 10 * np.std(equal) / 20


def test_kid_of_subsets_is_kid_in_the_mean():
    x, y = normal(60, 3), normal(60, 3, mean=1.0, seed=1)
    assert kid_of_subsets(x, y, subset_size=60) == pytest.approx(kid(x, y), rel=1e-9)
    assert kid_of_subsets(x, y, subset_size=20, num_subsets=300) == pytest.approx(kid(x, y), rel=0.05)


def test_identical_sets_are_at_no_distance():
    x = normal(500, 4)
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-9)
    # Unbiased, so a set against itself comes out slightly below nothing: k(x, x) is in one of three terms only.
    assert -0.2 < kid(x, x) < 0


def test_frechet_of_a_shifted_set_is_the_shift():
    x, shift = normal(50, 3), np.array([1.0, -2.0, 0.5])
    assert frechet_distance(x, x + shift) == pytest.approx(float(shift @ shift), rel=1e-9)


def test_frechet_of_independent_features_is_the_closed_form():
    """Diagonal covariances: the squared differences of means and of standard deviations."""
    mean_x, mean_y = np.array([0.0, 1.0, 2.0]), np.array([0.5, 1.0, -1.0])
    std_x, std_y = np.array([1.0, 2.0, 0.5]), np.array([2.0, 0.5, 0.5])
    x, y = (exact_moments(200, m, np.diag(s**2)) for m, s in ((mean_x, std_x), (mean_y, std_y)))
    wanted = ((mean_x - mean_y) ** 2).sum() + ((std_x - std_y) ** 2).sum()
    assert frechet_distance(x, y) == pytest.approx(wanted, rel=1e-9)


def test_frechet_of_any_gaussians_is_the_other_formula():
    """The trace of (C_x C_y)^(1/2) from the eigenvalues of the product, which is not symmetric."""
    cov_x, cov_y = random_covariance(5, 1), random_covariance(5, 2)
    mean_x, mean_y = normal(2, 5, seed=3)
    shared = np.sqrt(np.linalg.eigvals(cov_x @ cov_y).astype(complex)).sum().real
    wanted = ((mean_x - mean_y) ** 2).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * shared
    assert gaussian_distance(mean_x, cov_x, mean_y, cov_y) == pytest.approx(wanted, rel=1e-9)
    assert abs(cov_x @ cov_y - (cov_x @ cov_y).T).max() > 0.1
    of_samples = frechet_distance(
        exact_moments(90, mean_x, cov_x), exact_moments(80, mean_y, cov_y, seed=4)
    )
    assert of_samples == pytest.approx(wanted, rel=1e-9)


def test_extrapolation_takes_the_small_sample_bias_off():
    reference = exact_moments(4000, np.zeros(8), np.eye(8), seed=5)
    plain = [frechet_distance(normal(100, 8, seed=i), reference) for i in range(20)]
    corrected = [frechet_extrapolated(normal(100, 8, seed=i), reference) for i in range(20)]
    assert np.mean(plain) > 0.2
    assert abs(np.mean(corrected)) < 0.2 * np.mean(plain)


def test_frechet_is_finite_with_fewer_pictures_than_features():
    assert 0 < frechet_distance(normal(6, 20), normal(30, 20, seed=1)) < 100


def test_hits_of_one_name_and_of_two():
    scores = [[0.1, 3.0, 2.0], [0.1, 3.0, 2.0], [0.1, 3.0, 2.0], [5.0, 3.0, 2.0]]
    assert prompt_hits(scores, [(1,), (2,), (2, 1), (1, 2)]).tolist() == [1.0, 0.0, 1.0, 0.0]


def test_paired_distance_and_diversity():
    x = np.zeros((2, 4, 3, 3))
    y = x.copy()
    y[1] += 2.0
    assert squared_distances(x, y).tolist() == [0.0, 4.0]
    spread = diversity([[0.0, 0.0], [3.0, 4.0], [9.0, 9.0]], ["a", "a", "b"])
    assert_allclose(spread, [5.0, 5.0, np.nan])


def test_what_lies_among_real_pictures_is_within_their_manifold():
    reference = np.array([[0.0], [1.0], [3.0], [10.0]])
    # With k = 1 they reach 1, 1, 2 and 7: as far as the nearest other.
    x = np.array([[-0.9], [-1.1], [5.0], [16.9], [17.1], [4.0]])
    assert within_manifold(x, reference, k=1).tolist() == [1, 0, 1, 1, 0, 1]
    same, other = normal(300, 8, seed=1), normal(300, 8, mean=4.0, seed=2)
    real = normal(500, 8)
    assert within_manifold(same, real).mean() > 0.8
    assert within_manifold(other, real).mean() < 0.05
    with pytest.raises(ConfigError, match="k must lie"):
        within_manifold(x, reference, k=4)


def test_the_interval_of_a_mean_is_the_textbooks():
    values = normal(400, 1, mean=2.0, spread=3.0)[:, 0]
    found = mean_interval(values, np.arange(400))
    wanted = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert [found.high - found.value, found.value - found.low] == pytest.approx([wanted] * 2, rel=0.12)


def test_pictures_of_one_prompt_are_no_independent_evidence():
    """Ten seeds that all say the same as one: the interval is as wide as with one seed, not a third of it."""
    values, prompts = normal(50, 1)[:, 0], np.arange(50)
    one = mean_interval(values, prompts)
    ten = mean_interval(np.repeat(values, 10), np.repeat(prompts, 10))
    naive = mean_interval(np.repeat(values, 10), np.arange(500))
    assert (ten.low, ten.high) == pytest.approx((one.low, one.high))
    assert naive.high - naive.low < 0.5 * (one.high - one.low)


@pytest.mark.parametrize("interval_of", [kid_interval, frechet_interval])
def test_intervals_hold_what_they_should(interval_of):
    """Over many samples of one law, the interval holds the mean of the figure in about 95 % of them."""
    reference, num = normal(200, 3, seed=9), 60
    samples = [normal(num, 3, mean=0.5, seed=20 + i) for i in range(60)]
    intervals = [interval_of(x, reference, np.arange(num), num_resamples=100) for x in samples]
    mean = np.mean([interval.value for interval in intervals])
    holding = np.mean([interval.low <= mean <= interval.high for interval in intervals])
    assert 0.85 <= holding <= 1.0
    spread = np.std([interval.value for interval in intervals])
    lengths = np.mean([interval.high - interval.low for interval in intervals])
    assert 2.5 * spread < lengths < 6 * spread


@pytest.mark.parametrize("interval_of", [kid_interval, frechet_interval])
def test_intervals_over_seeds_hold_where_the_prompts_are_all_there_are(interval_of):
    """Forty prompts far apart, five pictures of each: only the pictures of a prompt are left to chance."""
    groups = np.repeat(np.arange(40), 5)
    centres = normal(40, 3, spread=2.0)
    reference = centres[np.arange(200) % 40] + normal(200, 3, seed=9)
    samples = [centres[groups] + normal(200, 3, mean=0.3, seed=20 + i) for i in range(60)]
    intervals = [interval_of(x, reference, groups, num_resamples=100, within=True) for x in samples]
    mean = np.mean([interval.value for interval in intervals])
    assert 0.85 <= np.mean([interval.low <= mean <= interval.high for interval in intervals]) <= 1.0
    of_prompts = interval_of(samples[0], reference, groups, num_resamples=100)
    assert of_prompts.high - of_prompts.low > 1.5 * (intervals[0].high - intervals[0].low)


def test_kid_of_resamples_is_not_biased_by_copies():
    x, reference = normal(30, 3), normal(300, 3, seed=1)
    found = kid_interval(x, reference, np.arange(30), num_resamples=2000)
    assert found.value == pytest.approx(kid(x, reference))
    naive = [kid(x[DRAW.integers(0, 30, 30)], reference) for _ in range(300)]
    assert np.mean(naive) - found.value > 0.2
    assert abs((found.low + found.high) / 2 - found.value) < 0.1


def test_a_paired_difference_is_sharper_than_two_intervals():
    level = normal(200, 1, spread=5.0)[:, 0]
    better = level - 0.5 + 0.1 * normal(200, 1, seed=1)[:, 0]
    groups = np.arange(200)
    assert difference_interval(better, level, groups).high < 0
    assert not mean_interval(better, groups).below(mean_interval(level, groups))
    assert rms_interval([4.0, 4.0], [0, 1]) == Interval(2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: kid([[1.0, 2.0]], [[1.0], [2.0]]), "equally wide"),
        (lambda: kid([[1.0]], [[1.0], [2.0]]), "at least 2 pictures"),
        (lambda: frechet_distance([[1.0, np.nan]], [[1.0, 2.0]]), "finite"),
        (lambda: kid_of_subsets(normal(5, 2), normal(5, 2), subset_size=6), r"\[2, 5\]"),
        (lambda: mean_interval([1.0, 2.0], [0, 0]), "at least 2 prompts"),
        (lambda: mean_interval([1.0, 2.0], [0, 0], within=True), "3 pictures of each prompt"),
        (lambda: squared_distances([[1.0]], [[1.0, 2.0]]), "one shape"),
        (lambda: prompt_hits([[1.0]], []), "1 pictures"),
    ],
)
def test_what_cannot_be_compared_is_refused(call, says):
    with pytest.raises(ConfigError, match=says):
        call()
