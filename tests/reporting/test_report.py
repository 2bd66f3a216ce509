"""The report: one page that holds all it shows, escapes all it is given, and reads on a telephone."""

import itertools
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from chromium import BROWSER, Page

import hfproj
from hfproj.errors import UsageError
from hfproj.files import portable
from hfproj.reporting import render_card, render_report
from hfproj.reporting.pictures import pictures_of
from hfproj.results import Change, Interval, Measurement, Results, findings, pack_outcomes, recorded, words
from hfproj.results.history import write_history

CARD = Path(__file__).resolve().parents[2] / "model_cards" / "vit_nano_digits_simclr"
HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>&$--"
VOID = {"meta", "link", "img"}
TAGS = re.findall(
    r"\w+",
    "html head meta title link style body header main section footer h1 h2 h3 p strong code pre ul li div figure img "
    "figcaption table thead tbody tr th td caption span details summary",
)


def a_result(name="layer", before=0.8, after=0.9, ranks=(14.0, 39.0), **changes):
    measurements = []
    for when, accuracy, rank in (("before", before, ranks[0]), ("after", after, ranks[1])):
        protocol = {"k": 20, "bank": name, "seed": 0}
        outcomes = pack_outcomes(np.arange(200) < 200 * accuracy)
        measurements += [
            Measurement("knn", "h", when, accuracy, f"set {name}", "accuracy", protocol, outcomes),
            Measurement("rankme", "h", when, 17.0, f"set {name}", "", {"rows": 200}),
            Measurement("rankme", "z", when, rank, f"set {name}", "", {"rows": 200}),
        ]
    g = np.random.default_rng(0)
    rows = [
        {"step": step, "loss": 5.0 - step, "rankme_h": 17.0, "std_z": 0.1, "lambda_min": -1.0, f"{name}_h": float(step)}
        for step in range(4)
    ]
    settings = {
        "config": {"base_model": name, "adapter": {"head": name, "out_dim": 128}, "recipe": {name: name}, name: name},
        "seeds": [0],
        "versions": {"torch": name},
        "command": f"python {name}",
        "measurements": measurements,
        "spectra": {"h before": [1.0, 0.5], "h after": [1.0, 0.6], name: [0.5, 0.1]},
        "notes": [name],
        "history": rows,
        "geometry": {
            "metric_condition_number": {name: [3.0, 4.0, None]},
            "orbits": {name: g.normal(size=(3, 4, 2)).tolist()},
            "covariance": {name: np.cov(g.normal(size=(3, 20))).tolist()},
            "feature_weights": {"layers": {name: [1.0, 0.5]}, "features": [name, "b"]},
            "collapse": {"step": 2, "cause": name, "what": f"Collapse: {name}"},
            "scalars": {name: 3, "gap": name},
        },
    }
    return Results(**{**settings, **changes})


class Structure(HTMLParser):
    """Every tag with its attributes, and the text; fails where tags do not nest."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.tags, self.open, self.text = [], [], ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        assert tag in TAGS, tag
        self.tags.append((tag, dict(attributes)))
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open and self.open[-1] != "style" else ""

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_the_page_of_a_real_run(tmp_path):
    path = hfproj.report(CARD, path=tmp_path / "new" / "page.html")
    page = Structure(path.read_text(encoding="utf-8"))
    assert "mlp head on vit_nano" in page.text
    results = hfproj.Results.load(CARD)
    knn, ranks = (
        {f"{layer} {when}": results.value(name, layer, when) for layer in "hz" for when in ("before", "after")}
        for name in ("knn", "rankme")
    )
    better = f"The representation got better: 20-NN accuracy of h on digits went from {knn['h before']:.4f} to"
    assert f"{better} {knn['h after']:.4f} (+0." in page.text
    went = [f"{ranks[f'{layer} before']:.1f} to {ranks[f'{layer} after']:.1f}" for layer in "hz"]
    ranks = f"RankMe of h went from {went[0]} and of z went from {went[1]} on digits."
    assert f"No sign of dimensional collapse: {ranks}" in page.text
    assert "accelerate launch recipes/simclr_vit.py --seed 0" in page.text
    assert f"{knn['h after']:.4f} ± " in page.text
    assert "collapse alarm" not in page.text
    assert len(page.all("img")) == 5  # probes, spectrum; rank and spread, loss and ratios, cosines over steps


@pytest.mark.parametrize("name", ["layer", HOSTILE])
def test_structure_and_nothing_from_elsewhere(name):
    page = Structure(render_report(a_result(name)))
    assert page.tags[0] == ("html", {"lang": "en"})
    assert len(page.all("img")) == 9
    assert all(image["alt"].endswith(".") and image["width"] and image["height"] for image in page.all("img"))
    for tag, attributes in page.tags:
        assert not any(key.startswith("on") or key == "style" for key in attributes), (tag, attributes)
        for key in ("src", "href"):
            assert attributes.get(key, "data:").startswith("data:")
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(later <= level + 1 for level, later in itertools.pairwise(headings))
    [policy] = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none';")
    for part in (
        f"set {name}",
        f"{name} head on {name}",
        f"The collapse alarm rang while it trained at step 2: Collapse: {name}",
        f"python {name}",
        f"bank = {name}",
    ):
        assert part in page.text
    assert page.text.index("The collapse alarm") < page.text.index("The representation got better")
    assert json.dumps(portable({name: name}), indent=1) in page.text


def test_the_same_results_give_the_same_page():
    one, other = (render_report(a_result(geometry={}, history=[])) for _ in range(2))
    assert one == other
    assert "<img" in one


def test_worse_unclear_and_unknown_are_said():
    bare = {"history": [], "spectra": {}, "geometry": {}}
    assert "The representation got worse" in Structure(render_report(a_result(before=0.9, after=0.7, **bare))).text
    text = Structure(render_report(a_result(before=0.9, after=0.9, **bare))).text
    assert "No gain was measured" in text
    assert "use the bare backbone" in text
    probe = [Measurement("probe", "h", when, v, unit="accuracy") for when, v in (("before", 0.8), ("after", 0.9))]
    assert "+0.1000; no interval" in Structure(render_report(a_result(measurements=probe, **bare))).text
    empty = Structure(render_report(Results()))
    assert "whether it got better is not known" in empty.text
    assert "Nothing was measured." in empty.text
    assert empty.all("img") == []


@pytest.mark.parametrize(
    ("ranks", "headline", "end"),
    [
        ((14.0, 39.0), "No sign of dimensional collapse", "of z went from 14.0 to 39.0 on set layer."),
        ((14.0, 7.0), "No sign of dimensional collapse", "of z went from 14.0 to 7.0 on set layer."),
        ((14.0, 6.9), "A sign of dimensional collapse", "of z went from 14.0 to 6.9 (less than half) on set layer."),
    ],
)
def test_ranks_in_words(ranks, headline, end):
    results = a_result(ranks=ranks, geometry={}, history=[], spectra={})
    [found] = [finding for finding in findings(results) if finding.sense in ("collapse", "rank")]
    assert found.headline == headline
    assert found.text.startswith("RankMe of h went from 17.0 to 17.0 and ")
    assert found.text.endswith(end)
    assert str(found) in Structure(render_report(results)).text


def test_history_comes_from_the_results_else_from_the_table_else_from_the_log(tmp_path):
    def text(**what):
        a_result(geometry={}, spectra={}, **what).save(tmp_path)
        page = Structure(hfproj.report(tmp_path).read_text())
        return " ".join(image["alt"] for image in page.all("img")) + page.text

    log = [{"step": step, "loss": 3.0 - step, "std_h": 0.2 + step} for step in range(2)]
    from_log = text(history=[], log=[*log, {"step": 1, "train_runtime": 3.0}])
    assert "std of h from 0.2 to 1.2" in from_log
    assert "those of the training batch" in from_log
    write_history([{"step": 0, "std_h": 0.5}, {"step": 1, "std_h": 0.25}], tmp_path)
    from_table = text(history=[], log=log)
    assert "std of h from 0.5 to 0.25" in from_table
    assert "those of the training batch" not in from_table
    rows = [{"step": step, "seed": seed, "std_h": 0.75 - step / 2} for seed in range(2) for step in range(2)]
    from_results = text(history=rows, log=log)
    assert "std of h from 0.75 to 0.25" in from_results
    assert "one standard deviation over seeds" in from_results


def test_a_folder_without_results(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UsageError, match=r"There is no file .*results\.json"):
            hfproj.report(folder)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_drawn_is_said(monkeypatch):
    geometry = {"orbits": {"h": "no points"}, "covariance": {"h": [1.0]}, "feature_weights": {"features": ["a"]}}
    page = Structure(render_report(a_result(geometry=geometry, spectra={"h after": [0.0]})))
    assert "Not drawn: Orbits of augmentation. Expected the orbits of 'h' as numbers" in page.text
    for title in ("Spectrum of the covariance", "Correlation of dimensions", "Weight of features"):
        assert f"Not drawn: {title}." in page.text
    assert len(page.all("img")) == 4  # those of the history
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    page = Structure(render_report(a_result()))
    assert page.all("img") == []
    assert page.text.count("pip install hfproj[plots]") == 1
    assert "Not drawn: Spectrum of the covariance, Rank and spread while training, " in page.text


def test_the_name_is_the_function_even_after_its_modules_are_imported():
    import hfproj.reporting.page

    assert callable(hfproj.report)
    assert hfproj.report is hfproj.reporting.report


def contrast(one, other):
    """WCAG's contrast ratio of two colours #rrggbb."""
    light = []
    for colour in (one, other):
        channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        light.append(linear @ [0.2126, 0.7152, 0.0722] + 0.05)
    return max(light) / min(light)


def test_letters_stand_out_in_both_schemes():
    style = render_report(Results())
    schemes = [dict(re.findall(r"--(\w+): (#\w{6});", part)) for part in re.findall(r":root \{(.*?)\}", style, re.S)]
    assert len(schemes) == 2
    for scheme in schemes:
        for letters in ("ink", "quiet", "good", "bad", "open"):
            for ground in ("paper", "block"):
                assert contrast(scheme[letters], scheme[ground]) >= 4.5, (letters, ground)


@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")
@pytest.mark.parametrize(("width", "dark"), [(360, True), (1200, False)])
def test_it_opens_in_a_browser_without_a_network_a_complaint_or_a_cut(tmp_path, width, dark):
    a_result(HOSTILE).save(tmp_path)
    path = hfproj.report(tmp_path)
    with Page(width, 740, dark=dark) as page:
        page.open(path)
        assert page.evaluate("innerWidth") == width
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        shown = page.evaluate(
            "Promise.all([...document.images].map(i => i.decode())).then(() => "
            "[...document.images].map(i => [i.getBoundingClientRect().left, i.getBoundingClientRect().right]))"
        )
        assert len(shown) == 9
        assert all(0 < left < right < width and right - left > 300 for left, right in shown)
        assert page.evaluate("getComputedStyle(document.body).backgroundColor !== 'rgb(255, 255, 255)'") == dark
        assert page.evaluate("document.scripts.length") == 0
        assert all(address.startswith("data:") for address in page.requests[1:])
        assert page.requests[0] == path.as_uri()
        assert page.complaints == []


def test_the_document_names_every_picture():
    text = (Path(__file__).resolve().parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(\w+)`", text, re.MULTILINE))
    assert named == {name for name in hfproj.plots.__all__ if name.startswith("plot_")}


def accuracies(name, layer, before, after):
    return [
        Measurement(name, layer, when, value, "digits", "accuracy", {"seed": 0})
        for when, value in (("before", before), ("after", after))
    ]


def test_probes_of_layers_are_drawn_where_there_are_several():
    measured = [
        m
        for name in ("linear", "knn")
        for i, layer in enumerate(("blocks.0", "blocks.1", "h", "z"))
        for m in accuracies(name, layer, 0.5 + i / 10, 0.6 + i / 10)
    ]
    both, *layers = pictures_of(Results(measurements=measured))
    assert both.title == "Probes before and after training"
    assert [label.get_text() for label in both.draw().axes[0].get_xticklabels()][-1].replace("\n", " ").endswith(": z")
    assert [picture.title for picture in layers] == ["K-NN accuracy, layer by layer", "Linear accuracy, layer by layer"]
    before, after = layers[1].draw().axes[0].lines
    np.testing.assert_allclose(before.get_ydata(), [0.5, 0.6, 0.7, 0.8])
    np.testing.assert_allclose(after.get_ydata(), [0.6, 0.7, 0.8, 0.9])
    few = [m for m in measured if m.layer == "h"]
    assert pictures_of(Results(measurements=few)) == []


ADAPTER = {"head": "mlp", "in_dim": 64, "out_dim": 16, "objective": {"name": "nt_xent", "temperature": 0.2}}
STEPS = [
    {"step": s, "loss": 4.0 - s, "rankme_h": 9.0 + s, "std_h": 0.1, "std_z": 0.2, "update_ratio_head": 0.1}
    for s in (0, 5)
]


def of_a_run(**changes):
    config = {"adapter": ADAPTER, "training": {"per_device_train_batch_size": 32}, **changes.pop("config", {})}
    return Results(**{"config": config, "history": STEPS, "command": "python x.py --seed 0", **changes})


def drawn_references(results):
    return {
        text.get_text(): round(text.xy[1], 6)
        for picture in pictures_of(results)
        for axes in picture.draw().axes
        for text in axes.texts
    }


def test_curves_have_what_they_are_compared_with():
    evenly = {"1/√64": 0.125, "1/√16": 0.25}
    assert drawn_references(of_a_run()) == evenly | {"ln(2·32 − 1)": round(np.log(63), 6)}
    two = of_a_run(command="accelerate launch --num_processes 2 x.py")
    assert drawn_references(two)["ln(2·64 − 1)"] == round(np.log(127), 6)
    for other in (
        {"adapter": {**ADAPTER, "objective": {"name": "byol"}}},
        {"adapter": {**ADAPTER, "regularizers": {"koleo": {}}}},
        {"adapter": {**ADAPTER, "objective": {"name": "nt_xent", "gather": False}}},
        {"recipe": {"views": "num_views=4"}},
        {"training": {}},
    ):
        assert drawn_references(of_a_run(config=other)) == evenly
    assert drawn_references(of_a_run(config={"adapter": {"in_dim": "wide"}})) == {}


def test_ranks_of_probe_views_of_batches_and_of_held_out_items_have_names_of_their_own():
    def titles(results):
        return [axes.get_title("left") for picture in pictures_of(results) for axes in picture.draw().axes]

    assert "RankMe of probe views, in directions" in titles(of_a_run())
    log = [{"step": 5, "loss": 1.0, "batch_rankme_h": 3.0}, {"step": 5, "eval_rankme_h": 4.0, "eval_knn_h": 0.5}]
    found = titles(of_a_run(history=[], log=log))
    assert "RankMe of the training batch, in directions" in found
    assert "RankMe of held-out items, in directions" in found
    assert "k-NN accuracy of held-out items ↑" in found
    assert sum("held-out" in title for title in found) == 2  # each once
    page = Structure(render_report(a_result())).text
    assert "are other numbers" in page
    assert "not the numbers of held-out items in the table" in page


def test_arrows_say_what_is_better_where_it_is_known():
    measured = [*a_result().measurements, Measurement("alpha_req", "h", "after", 1.0, "set layer")]
    page = Structure(render_report(a_result(measurements=measured))).text
    assert "20-NN accuracy ↑" in page
    assert "α-ReQ ↓" in page
    assert "RankMe ↑" not in page
    assert "↑" not in a_result().table()


@pytest.mark.parametrize(
    ("spectrum", "said"),
    [([1.0, 0.5, 0.4, 1e-9], True), ([1.0, 0.5, 1e-9, 1e-9], False), ([1.0, 0.5, 0.4, 0.3], False)],
)
def test_the_fall_of_the_last_eigenvalue_is_explained_where_it_falls(spectrum, said):
    [picture] = pictures_of(Results(spectra={"h after": spectrum, "z after": [1.0, 1e-9]}))
    assert ("LayerNorm" in picture.caption) == said


def test_the_last_eigenvalue_of_a_layer_norm_is_zero_along_its_inverse_weights():
    backbone = hfproj.load_backbone("vit_nano")
    images = hfproj.load_image_dataset("digits", split="test").select(range(200))
    h = hfproj.extract_features(backbone, images).h.double()
    values, vectors = np.linalg.eigh(np.cov(h.numpy().T))
    direction = 1 / backbone.layernorm.weight.detach().double().numpy()
    assert values[0] < 1e-6 * values[1]
    assert abs(vectors[:, 0] @ direction) / np.linalg.norm(direction) > 0.9999


def test_ratios_are_all_explained():
    [picture] = [p for p in pictures_of(of_a_run()) if p.title == "Training"]
    assert all(f"{name} ratio" in picture.caption for name in ("update", "gradient", "timescale"))


def test_without_labels_the_box_says_how_far_it_can_be_told():
    change = Change("alpha_req", 3.0, 2.0, Interval(-1.0, -1.2, -0.8))
    results = a_result(measurements=[], geometry={"unlabelled": recorded([change])})
    page = render_report(results)
    box = page[page.index('<section class="verdict better"') :].partition("</section>")[0]
    assert "The representation got better, as far as can be told without labels</strong>: α-ReQ of h went" in box
    assert words.UNKNOWN not in page
    assert "got better, as far as can be told without labels" in render_card(results)
