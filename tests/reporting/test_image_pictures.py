"""Pictures of the user's own images: right neighbours, maps that are turned alike, on the page and nowhere else."""

import sys
import types

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_report import Structure, a_result

import hfproj
from hfproj import filenames, plots
from hfproj.errors import UsageError
from hfproj.reporting import images, maps, write_image_pictures
from hfproj.reporting.card import write_card
from hfproj.reporting.images import shown
from hfproj.reporting.maps import spaced


@pytest.fixture(scope="module")
def backbone():
    return hfproj.load_backbone("vit_nano")


@pytest.fixture(scope="module")
def digits():
    return hfproj.load_image_dataset("digits", split="test").select(range(40))


H = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def written(backbone, digits, tmp_path):
    views = hfproj.ImageViews.for_model(backbone, scale=(0.4, 1.0))
    paths = write_image_pictures(tmp_path, backbone, digits, H, H.flip(1), views=views)
    assert [path.name for path in paths] == list(filenames.OF_IMAGES)
    return tmp_path


def test_they_are_on_the_page_and_not_on_the_card(written):
    a_result().save(written)
    page = hfproj.report(written).read_text()
    assert page.count("data:image/png;base64,") == 3
    assert len(page) < 3_000_000
    text = Structure(page).text
    assert all(title in text for title in ("Views, as the model gets them", "Nearest neighbours", "Map of h"))
    card = write_card(a_result(), written).read_text()
    assert not any(name in card for name in filenames.OF_IMAGES)


def test_what_is_no_picture_or_too_large_is_left_out(written):
    a_result().save(written)
    whole = (written / filenames.MAP).read_bytes()
    (written / filenames.VIEWS).write_bytes(b"<svg onload='alert(1)'/>")
    (written / filenames.NEIGHBOURS).write_bytes(whole[:-20])
    (written / "other.png").write_bytes(whole)
    assert hfproj.report(written).read_text().count("data:image/png;base64,") == 1
    (written / filenames.MAP).write_bytes(whole[:-12] + bytes(maps.LARGEST) + whole[-12:])
    assert hfproj.report(written).read_text().count("data:image/png;base64,") == 0


def drawn(monkeypatch, name):
    """Keep what a plot is called with."""
    kept = {}

    def plot(*args, **options):
        kept.update(options, args=args)
        return getattr(original, name)(*args, **options)

    original = types.SimpleNamespace(**{name: getattr(plots, name)})
    monkeypatch.setattr(plots, name, plot)
    return kept


def test_neighbours_are_the_nearest_others_and_marked_by_their_labels(monkeypatch, backbone, digits, tmp_path):
    kept = drawn(monkeypatch, "plot_neighbours")
    write_image_pictures(tmp_path, backbone, digits, H, H.flip(1) + 1)
    rows = spaced(40, images._QUERIES)
    labels = np.array(digits["label"])
    unit = torch.nn.functional.normalize(H.double(), dim=1)
    cosine = unit @ unit.T
    cosine.fill_diagonal_(-2)
    nearest = cosine.topk(5).indices[rows].numpy()
    assert kept["right"]["before"] == (labels[nearest] == labels[rows][:, None]).tolist()
    assert kept["names"] == [str(label) for label in labels[rows]]
    pixels = np.asarray(digits[int(nearest[0, 0])]["image"].convert("RGB").resize((32, 32))) / 255.0
    assert np.abs(kept["args"][1]["before"][0, 0] - pixels).mean() < 0.05
    kept.clear()
    write_image_pictures(tmp_path, backbone, digits, H, H, label_column=None)
    assert kept["right"] is None


def test_maps_are_turned_onto_the_first_and_keep_distances():
    turned = H @ torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))[0]
    before, after = maps.maps({"before": H, "after": turned}).values()
    np.testing.assert_allclose(before, after, atol=1e-6)
    unit = torch.nn.functional.normalize(H.double(), dim=1)
    _, vectors = np.linalg.eigh(np.cov(unit.numpy().T))
    expected = (unit - unit.mean(0)).numpy() @ vectors[:, [-1, -2]]
    distances = [np.linalg.norm(p[:, None] - p[None], axis=-1) for p in (before, expected)]
    np.testing.assert_allclose(*distances, atol=1e-10)
    assert [*maps.maps({"before": torch.ones(3, 2)})] == ["before: PCA, 0% of variance"]


def test_umap_is_drawn_where_it_is_installed(monkeypatch):
    class UMAP:
        def __init__(self, **options):
            assert options["metric"] == "cosine"

        def fit_transform(self, rows):
            return rows[:, :2].astype(np.float32)

    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=UMAP))
    found = maps.maps({"before": H, "after": H})
    assert [name.split(",")[0] for name in found] == ["before: PCA", "after: PCA", "before: UMAP", "after: UMAP"]


@pytest.mark.long
def test_umap_of_the_package():
    pytest.importorskip("umap", reason="umap-learn is not installed")
    found = maps.maps({"before": H, "after": H})
    assert [*found][2:] == ["before: UMAP", "after: UMAP"]
    np.testing.assert_array_equal(found["before: UMAP"], found["after: UMAP"])
    assert found["before: UMAP"].shape == (40, 2)


def test_pixels_come_back(backbone):
    views = hfproj.ImageViews.for_model(backbone)
    x = torch.rand(2, 3, 8, 8)
    np.testing.assert_allclose(shown(views._normalized(x.clone()), views), x.permute(0, 2, 3, 1), atol=1e-6)
    ten = types.SimpleNamespace(mean=torch.zeros(5, 1, 1), std=torch.ones(5, 1, 1), flip_channels=False)
    assert shown(torch.rand(2, 5, 4, 4), ten).shape == (2, 4, 4, 1)


def test_photographs_fit_the_page(backbone, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    data = Dataset.from_dict({"image": list(noise)}).with_format("numpy")
    h = torch.randn(12, 4)
    for path in write_image_pictures(tmp_path, backbone, data, h, h, views=hfproj.ImageViews.for_model(backbone)):
        assert path.stat().st_size <= maps.LARGEST


def test_without_matplotlib_nothing_is_written_and_rows_have_to_pair(monkeypatch, backbone, digits, tmp_path):
    with pytest.raises(UsageError, match="40 and 3 rows of 40 images"):
        write_image_pictures(tmp_path, backbone, digits, H, H[:3])
    (tmp_path / filenames.VIEWS).write_bytes(b"of a run before")
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert write_image_pictures(tmp_path, backbone, digits, H, H) == []
    assert list(tmp_path.iterdir()) == []
