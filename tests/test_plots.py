import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from hfproj.errors import HfprojError, UsageError
from hfproj.plots import plot_spectrum

SPECTRA = {
    "z after": torch.tensor([1.0, 0.1, 0.0]),
    "h before": [1.0, 0.5, 0.2, 0.1],
    "h after": np.array([1.0, 0.7, 0.4, 0.2]),
    "z before": [0.5, 0.1, None],
}


def test_curves_axes_and_styles():
    axes = plot_spectrum(SPECTRA).axes[0]
    lines = axes.get_lines()
    labels = [line.get_label() for line in lines]
    assert labels[0] == "representation h, before training"
    assert labels[3] == "projection z, after training"
    assert len({line.get_color() for line in lines}) == len({str(line._dash_pattern) for line in lines}) == 4
    assert axes.get_yscale() == "log"
    assert axes.get_xlabel() == "rank of the eigenvalue"
    assert "eigenvalue" in axes.get_ylabel()
    assert list(lines[0].get_xdata()) == [1, 2, 3, 4]
    assert axes.get_ylim()[0] >= 1e-10  # a zero eigenvalue leaves the picture at its lower edge


def test_other_names_and_one_eigenvalue():
    axes = plot_spectrum({"mine": [1.0], "yours": [2.0, 1.0]}).axes[0]
    assert [line.get_label() for line in axes.get_lines()] == ["mine", "yours"]


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_same_spectra_give_the_same_bytes(tmp_path, suffix):
    for name in ("a", "b"):
        plot_spectrum(SPECTRA, tmp_path / f"{name}.{suffix}")
    assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()
    assert sorted(os.listdir(tmp_path)) == [f"a.{suffix}", f"b.{suffix}"]


def test_global_state_of_matplotlib_stays_untouched():
    code = (
        "import sys, hfproj.plots as p; assert 'matplotlib' not in sys.modules;"
        "p.plot_spectrum({'h after': [1.0, 0.5]}); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("spectra", [{}, {"h after": []}, {"h after": [0.0, 0.0]}, {"h after": [None]}])
def test_nothing_to_draw(spectra):
    with pytest.raises(UsageError):
        plot_spectrum(spectra)


def test_unknown_format(tmp_path):
    with pytest.raises(UsageError, match=r"\.png, \.svg or \.pdf"):
        plot_spectrum(SPECTRA, tmp_path / "a.gif")


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(HfprojError, match=r"pip install hfproj\[plots\]"):
        plot_spectrum(SPECTRA)
