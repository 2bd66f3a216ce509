"""Figures of images: what is where, how right and wrong are told apart, and that bad input is refused in words."""

import numpy as np
import pytest
import torch

from hfproj.errors import UsageError
from hfproj.plots import plot_map, plot_neighbours, plot_views

G = np.random.default_rng(0)
PIXELS = G.random((2, 6, 6, 3))
NEAR = {"before": G.random((2, 3, 6, 6, 3)), "after": G.random((2, 3, 6, 6, 3))}
RIGHT = {"before": [[1, 0, 0], [0, 0, 0]], "after": [[1, 1, 1], [1, 0, 1]]}
POINTS = {"before": G.normal(size=(30, 2)), "after": G.normal(size=(30, 2))}
LABELS = [str(i % 3) for i in range(30)]
FIGURES = {
    plot_views: ({"image": PIXELS, "view 1": PIXELS[..., :1]},),
    plot_neighbours: (PIXELS, NEAR),
    plot_map: (POINTS,),
}


def text_of(axes):
    return [text.get_text() for text in axes.texts]


@pytest.mark.parametrize("plot", [plot_views, plot_neighbours, plot_map], ids=lambda f: f.__name__)
def test_the_same_bytes_and_nothing_cut_off(plot, tmp_path):
    for name in ("a", "b"):
        figure = plot(*FIGURES[plot], path=tmp_path / f"{name}.png", width=4.0)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    box = figure.get_tightbbox()
    assert box.x0 > -0.02
    assert box.x1 < 4.02
    assert box.y1 < figure.get_figheight() + 0.02


def test_views_stand_beside_their_image_and_pixels_are_drawn_as_they_are():
    whole = (PIXELS * 255).round().astype(np.uint8)
    figure = plot_views({"image": torch.tensor(whole), "view": PIXELS[..., :1]})
    drawn = [axes.images[0].get_array() for axes in figure.axes]
    assert len(drawn) == 4
    np.testing.assert_allclose(drawn[0], whole[0] / 255)
    np.testing.assert_allclose(drawn[3], PIXELS[1, ..., 0])
    assert [axes.get_title("left") for axes in figure.axes[:2]] == ["image", "view"]


def test_right_and_wrong_differ_by_sign_and_line_and_not_by_colour_alone():
    figure = plot_neighbours(PIXELS, NEAR, right=RIGHT, names=["cat", "dog"])
    rows = np.reshape(np.array(figure.axes, dtype=object), (4, 4))
    assert [row[0].get_ylabel() for row in rows] == ["before", "after", "before", "after"]
    assert text_of(rows[1, 0]) == ["cat"]  # below its query
    signs = [[text_of(axes)[0] for axes in row[1:]] for row in rows]
    assert signs == [["✓", "✗", "✗"], ["✓", "✓", "✓"], ["✗", "✗", "✗"], ["✓", "✗", "✓"]]
    right, wrong = (rows[0, place].spines["left"] for place in (1, 2))
    assert right.get_linestyle() != wrong.get_linestyle()
    assert right.get_edgecolor() != wrong.get_edgecolor()
    np.testing.assert_array_equal(rows[3, 2].images[0].get_array(), NEAR["after"][1, 1])
    bare = plot_neighbours(PIXELS, NEAR)
    assert not any(text for axes in bare.axes for text in text_of(axes))


def test_a_map_has_a_legend_where_labels_are_given_and_greys_what_is_rare():
    assert plot_map(POINTS).legends == []
    figure = plot_map(POINTS, labels=LABELS)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["0", "1", "2"]
    assert len({tuple(points.get_facecolor()[0]) for points in figure.axes[0].collections}) == 3
    many = plot_map({"a": G.normal(size=(40, 2))}, labels=[*map(str, range(13)), *map(str, range(13)), *["0"] * 14])
    names = [text.get_text() for text in many.legends[0].get_texts()]
    assert names[0] == "others"
    assert len(names) == 13
    assert names[1:4] == ["0", "1", "2"]  # 2 before 10


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: plot_views({}), "columns: name"),
        (lambda: plot_views({"a": PIXELS, "b": PIXELS[:1]}), "the same images"),
        (lambda: plot_views({"a": PIXELS * 3 - 1}), "undo mean and std"),
        (lambda: plot_views({"a": PIXELS[..., :2]}), "1 or 3"),
        (lambda: plot_neighbours(PIXELS[:1], NEAR), "k neighbours"),
        (lambda: plot_neighbours(PIXELS, NEAR, right={"after": [[1]]}), "right and wrong of 'after'"),
        (lambda: plot_map({"a": [[1.0, 2.0, 3.0]]}), "points"),
        (lambda: plot_map({"a": [[1.0, np.nan]]}), "finite"),
        (lambda: plot_map(POINTS, labels=["a"]), "a label for each"),
    ],
)
def test_what_does_not_fit_is_said(call, said):
    with pytest.raises(UsageError, match=said):
        call()
