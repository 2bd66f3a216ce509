"""Grids of which the ordinary suite runs a part, and `-m long` the rest."""

import pytest


def thinned(cases, every=2):
    """Return the cases for `parametrize`; all but each so manieth are marked `long`."""

    def later(case):
        return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.long)

    return [case if number % every == 0 else later(case) for number, case in enumerate(cases)]
