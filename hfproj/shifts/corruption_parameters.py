"""Parameters of the fifteen corruptions, as published for 32, 64 and 224 pixels.

References:
    Hendrycks and Dietterich, ICLR 2019, arXiv 1903.12261; hendrycks/robustness, ``ImageNet-C/create_c/make_cifar_c.py``
    (ca36008), ``make_tinyimagenet_c.py`` (7a64e6a) and ``make_imagenet_c.py`` (e0377d4).
"""

SIDES = (32, 64, 224)
_E = 244  # ImageNet-C's elastic lengths are fractions of 244 pixels, at 224

# name: (what it is, the parameters of severities 1 to 5 at each side of `SIDES`)
PARAMETERS: dict[str, tuple[str, tuple[tuple, ...]]] = {
    "gaussian_noise": (
        "noise: normal, of this standard deviation",
        ((0.04, 0.06, 0.08, 0.09, 0.1), (0.04, 0.08, 0.12, 0.15, 0.18), (0.08, 0.12, 0.18, 0.26, 0.38)),
    ),
    "shot_noise": (
        "noise: Poisson, of so many photons at white",
        ((500, 250, 100, 75, 50), (250, 100, 50, 30, 15), (60, 25, 12, 5, 3)),
    ),
    "impulse_noise": (
        "noise: this fraction of the values becomes 0 or 1",
        ((0.01, 0.02, 0.03, 0.05, 0.07), (0.01, 0.02, 0.05, 0.08, 0.14), (0.03, 0.06, 0.09, 0.17, 0.27)),
    ),
    "defocus_blur": (
        "blur: mean over a disk (its radius, width of its soft edge)",
        (
            ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
            ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
            ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        ),
    ),
    "glass_blur": (
        "blur: pixels replaced by near ones (width of a Gaussian before and after, reach, turns)",
        (
            ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
            ((0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)),
            ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        ),
    ),
    "motion_blur": (
        "blur: along a line (radius, width), within 45 degrees of horizontal",
        (
            ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
            ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
            ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        ),
    ),
    "zoom_blur": (
        "blur: mean over magnifications (largest, step)",
        (
            ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
            ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
            ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
        ),
    ),
    "snow": (
        "weather: flakes (mean, deviation, magnification, threshold, radius and width of motion, colour kept)",
        (
            (
                (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
                (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
                (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
                (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
                (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
            ),
            (
                (0.1, 0.2, 1, 0.6, 8, 3, 0.8),
                (0.1, 0.2, 1, 0.5, 10, 4, 0.8),
                (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7),
                (0.25, 0.3, 2.25, 0.6, 12, 6, 0.65),
                (0.3, 0.3, 1.25, 0.65, 14, 12, 0.6),
            ),
            (
                (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
                (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
                (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
                (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
                (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
            ),
        ),
    ),
    "frost": (
        "weather: ice on the lens (weights of image and ice)",
        (
            ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
            ((1, 0.3), (0.9, 0.4), (0.8, 0.45), (0.75, 0.5), (0.7, 0.55)),
            ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
        ),
    ),
    "fog": (
        "weather: a fractal cloud (its weight, decay from scale to scale)",
        (
            ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
            ((0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)),
            ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        ),
    ),
    "brightness": (
        "weather: added to HSV's value",
        ((0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5), (0.1, 0.2, 0.3, 0.4, 0.5)),
    ),
    "contrast": (
        "digital: distances from each channel's mean times this",
        ((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05), (0.4, 0.3, 0.2, 0.1, 0.05)),
    ),
    "elastic_transform": (
        "digital: warped (shift, width of its smoothing, affine shift; all fractions of the side)",
        (
            ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
            ((0, 0, 0.08), (0.05, 0.3, 0.06), (0.1, 0.08, 0.06), (0.1, 0.03, 0.03), (0.16, 0.03, 0.02)),
            tuple(
                tuple(length * _E / 224 for length in lengths)
                for lengths in (
                    (2, 0.7, 0.1),
                    (2, 0.08, 0.2),
                    (0.05, 0.01, 0.02),
                    (0.07, 0.01, 0.02),
                    (0.12, 0.01, 0.02),
                )
            ),
        ),
    ),
    "pixelate": (
        "digital: shrunk to this fraction of the side and back",
        ((0.95, 0.9, 0.85, 0.75, 0.65), (0.9, 0.8, 0.7, 0.6, 0.5), (0.6, 0.5, 0.4, 0.3, 0.25)),
    ),
    "jpeg_compression": (
        "digital: JPEG of this quality",
        ((80, 65, 58, 50, 40), (65, 58, 50, 40, 25), (25, 18, 15, 10, 7)),
    ),
}
