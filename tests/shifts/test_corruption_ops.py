"""Each operation against scipy, or against the published loop written pixel by pixel."""

import numpy as np
import pytest
import scipy.ndimage as ndi
from scipy.stats import poisson as scipy_poisson

from hfproj.shifts import corruption_ops as ops
from hfproj.shifts.corruption_ops import Draws

RNG = np.random.default_rng(0)
IMAGE = RNG.random((3, 11, 14))


@pytest.mark.parametrize("sigma", [0.05, 0.4, 1.5])
def test_gaussian_blur(sigma):
    expected = np.stack([ndi.gaussian_filter(part, sigma, mode="nearest", truncate=4) for part in IMAGE])
    np.testing.assert_allclose(ops.gaussian_blur(IMAGE, sigma), expected, atol=1e-14)


@pytest.mark.parametrize("sigma", [0.1, 0.9, 5.0, 60.0])  # the last reaches over the image many times
def test_smooth(sigma):
    expected = ndi.gaussian_filter(IMAGE[0], sigma, mode="reflect", truncate=3)
    np.testing.assert_allclose(ops.smooth(IMAGE[0], sigma, truncate=3), expected, atol=1e-13)


@pytest.mark.parametrize(("radius", "soft"), [(0.3, 0.4), (1, 0.2), (1.5, 0.1), (4, 0.5), (9.5, 0.5)])
def test_disk_blur(radius, soft):
    x = RNG.random((3, 30, 33))
    reach = 14
    y, z = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    kernel = (y**2 + z**2 <= radius**2).astype(float)
    taps = np.arange(-2, 3) if radius > 8 else np.arange(-1, 2)
    weights = np.exp(-(taps**2) / (2 * soft**2))
    weights /= weights.sum()
    kernel = ndi.convolve(kernel / kernel.sum(), np.outer(weights, weights), mode="constant")
    expected = np.stack([ndi.convolve(part, kernel, mode="mirror") for part in x])
    np.testing.assert_allclose(ops.disk_blur(x, radius, soft), expected, atol=1e-12)


@pytest.mark.parametrize("degrees", [0, 33, -45, 90, -120, 180])
def test_motion_blur(degrees):
    radius, sigma = 3, 2.0
    expected = np.zeros_like(IMAGE)
    weights = [np.exp(-(i**2) / (2 * sigma**2)) for i in range(2 * radius + 1)]
    for row in range(11):
        for column in range(14):
            for i, weight in enumerate(weights):
                down = int(np.ceil(i * np.sin(np.radians(degrees)) - 0.5))
                right = int(np.ceil(i * np.cos(np.radians(degrees)) - 0.5))
                source = IMAGE[:, np.clip(row + down, 0, 10), np.clip(column + right, 0, 13)]
                expected[:, row, column] += weight / sum(weights) * source
    np.testing.assert_allclose(ops.motion_blur(IMAGE, radius, sigma, degrees), expected, atol=1e-14)


@pytest.mark.parametrize("factor", [1.0, 1.07, 2.5])
def test_zoom(factor):
    rows, columns = np.mgrid[:11, :14].astype(float)
    where = [(rows - 5) / factor + 5, (columns - 6.5) / factor + 6.5]
    expected = np.stack([ndi.map_coordinates(part, where, order=1) for part in IMAGE])
    np.testing.assert_allclose(ops.zoom(IMAGE, factor), expected, atol=1e-14)


def test_sample_is_mirrored_beyond_the_borders():
    where = RNG.uniform(-25, 35, (2, 40, 50))
    expected = np.stack([ndi.map_coordinates(part, where, order=1, mode="mirror") for part in IMAGE])
    np.testing.assert_allclose(ops.sample(IMAGE, *where), expected, atol=1e-13)
    one = np.full((3, 1, 1), 0.25)
    assert (ops.sample(one, *where) == 0.25).all()


@pytest.mark.parametrize("rate", [3, 60, 500])
def test_poisson_inverts_the_distribution_function(rate):
    grey, u = RNG.integers(0, 256, 4000), RNG.random(4000)
    expected = scipy_poisson.ppf(u, grey * (rate / 255))
    assert (ops.poisson(grey, rate, u) == expected).mean() > 0.9999
    assert ops.poisson(np.array([0, 255]), rate, np.array([1 - 1e-10] * 2))[0] == 0


def test_plasma_is_the_diamond_square_rule():
    """Point by point: squares get their centre, then diamonds theirs, each from its four neighbours on a torus."""
    size, decay, stream = 8, 1.7, 40
    u = 2 * Draws(5, 3, stream).uniform(size, size) - 1
    cloud, step, amplitude = {(0, 0): 0.0}, size, 100.0
    while step >= 2:
        half = step // 2
        for r in range(half, size, step):
            for c in range(half, size, step):
                around = [cloud[(r + i) % size, (c + j) % size] for i in (-half, half) for j in (-half, half)]
                cloud[r, c] = np.mean(around) + amplitude * amplitude * u[r, c]
        for r in range(0, size, half):
            for c in range((r + half) % step, size, step):
                around = [
                    cloud[(r + i) % size, (c + j) % size] for i, j in ((-half, 0), (half, 0), (0, -half), (0, half))
                ]
                cloud[r, c] = np.mean(around) + amplitude * amplitude * u[r, c]
        step, amplitude = half, amplitude / decay
    expected = np.array([[cloud[r, c] for c in range(size)] for r in range(size)])
    expected = (expected - expected.min()) / np.ptp(expected)
    np.testing.assert_allclose(ops.plasma(Draws(5, 3, stream), 7, decay), expected, atol=1e-12)


@pytest.mark.parametrize("reach", [1, 3])
def test_copies_go_in_order(reach):
    height, width = 11, 14
    u = RNG.random((2, height - 2 * reach, width - 2 * reach, 2))
    expected = IMAGE.copy()
    for turn in u:
        for i, r in enumerate(range(height - reach, reach, -1)):
            for j, c in enumerate(range(width - reach, reach, -1)):
                down, right = np.floor(turn[i, j] * 2 * reach).astype(int) - reach
                expected[:, r, c] = expected[:, r + down, c + right]
    assert np.array_equal(ops.copy_nearby(IMAGE, u, reach), expected)


def test_frost_has_the_brightness_of_the_photographs():
    for side in (32, 224):
        ice = np.stack([ops.frost_texture(Draws(0, i, 0), side, side + 3) for i in range(4)])
        assert ice.shape == (4, 3, side, side + 3)
        assert ice.min() >= 0
        assert ice.max() <= 1
        assert 0.51 <= ice.mean() <= 0.81  # of the five published photographs; so is the range of the deviation
        assert 0.07 <= ice.mean(axis=1).std() <= 0.17


def test_draws_have_their_distributions_and_do_not_repeat():
    draws = Draws(0, 5, 100)
    u, n, odd = draws.uniform(20000), draws.normal(200, 100), draws.normal(3)
    assert 0 < u.min() < u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01  # 5 standard errors
    assert abs(n.mean()) < 0.035
    assert abs(n.std() - 1) < 0.025
    assert abs(np.corrcoef(u, n.ravel())[0, 1]) < 0.035
    assert odd.shape == (3,)
    again = Draws(0, 5, 100)
    assert np.array_equal(u, again.uniform(20000))
    for other in (Draws(1, 5, 100), Draws(0, 6, 100), Draws(0, 5, 356)):
        assert not np.isin(other.uniform(20000), u).any()
