"""Data that is broken: one line in bounded time and memory, or skipped where that is asked for."""

import contextlib
import io
import logging
import os
import resource

import forked
import numpy as np
import pytest
import torch
from cases import assert_refused
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from faults import image_inputs
from PIL import EpsImagePlugin, Image
from small import images, trainer, views

import hfproj
from hfproj.data import StreamDataset, without_bad_images
from hfproj.data.indexing import SKIPPED

BROKEN = {"bytes": b"no image", "path": None}


def tried(tries):
    """Return what went wrong in tries, raw errors included: what → why."""
    found = {}
    for what, function, arguments in tries:
        try:
            wrong = function(*arguments)
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            found[what] = wrong
    return found


def test_everything_an_item_may_hold():
    assert tried(image_inputs.all_tries(damages=1)) == {}


def grown_by_bombs():
    """Refuse the files of the issue, of 18 KB, in each way; return by how many megabytes the memory has grown."""
    files = dict(image_inputs.bombs())
    rows = [{"bytes": data, "path": None} for data in files.values()]
    data = Dataset.from_dict({"image": rows}, features=Features({"image": ImageFeature()}))
    assert max(map(len, files.values())) < 20_000
    collate = hfproj.EvalImages(**image_inputs.PIXELS)

    def refused(call):
        with pytest.raises(hfproj.UsageError, match="MAX_IMAGE_PIXELS"):
            call()

    with contextlib.suppress(hfproj.UsageError):  # imports what it needs
        hfproj.IndexedDataset([{"image": 0}])[0]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i, row in enumerate(rows):
        refused(lambda row=row: collate([{"image": row}]))
        refused(lambda i=i: hfproj.IndexedDataset(data)[i])
        refused(lambda i=i: hfproj.IndexedDataset(data).__getitems__([i]))
        opened = image_inputs.lazy(row["bytes"])
        if opened is not None:
            refused(lambda opened=opened: collate([{"image": opened}]))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024


def test_a_bomb_takes_no_memory():
    """In a process of its own, whose memory has not grown before."""
    (grown,) = forked.returned(grown_by_bombs)
    assert grown < 60  # megabytes, of Pillow's plugins and the files themselves; decoded it was 2,300


def test_the_limit_of_pixels_is_pillows(monkeypatch):
    big = Image.new("L", (30, 40))
    collate = hfproj.EvalImages(**image_inputs.PIXELS)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1199)
    assert_refused(
        lambda: collate([{"image": big, "index": 3}]), "30 × 40 pixels", "1199", "item 3", "(None: no limit)"
    )
    for limit in (1200, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert collate([{"image": big}])["pixel_values"].shape == (1, 3, 8, 8)


def test_the_limit_of_pixels_holds_for_what_shows_a_shape(monkeypatch):
    to_rgb, to_image = hfproj.data.to_rgb_tensor, hfproj.data.pixels.to_image_tensor
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for shape in ((10, 10), (10, 10, 3), (3, 10, 10), (50, 2, 4), (1, 10, 10)):
        assert to_rgb(np.zeros(shape, np.uint8)).shape[1:].numel() == 100
        assert to_rgb(torch.zeros(shape)).shape[1:].numel() == 100
    assert to_image(np.zeros((10, 10, 13), np.uint8), 13).shape == (13, 10, 10)
    for shape in ((10, 11), (10, 11, 3), (3, 11, 10), (101, 1, 3), (2, 10, 10, 3)):
        for image in (np.zeros(shape), torch.zeros(shape, dtype=torch.bfloat16), image_inputs.Array(np.zeros(shape))):
            assert_refused(lambda image=image: to_rgb(image), "pixels, more than the limit of 100", "MAX_IMAGE_PIXELS")
    assert_refused(lambda: to_image(torch.zeros(13, 10, 11), 13), "10 pixels, more than the limit of 100")


def test_arrays_that_show_more_than_the_memory_has_are_refused_by_their_shape():
    for name, image in image_inputs.large_arrays():
        for collate in (hfproj.EvalImages(**image_inputs.PIXELS), views()):
            with pytest.raises(hfproj.UsageError, match="more than the limit of"):
                collate([{"image": image, "index": 0}])
            assert name


def test_labels_that_are_arrays_are_named_by_their_shape():
    for label in (np.broadcast_to(np.int64(1), (200_000, 200_000)), torch.ones(1).expand(200_000, 200_000)):
        assert_refused(
            lambda label=label: hfproj.EvalImages(**image_inputs.PIXELS)([{**images(1)[0], "label": label}]),
            "of shape [200000, 200000]", "A score is no class",
        )  # fmt: skip
    from hfproj.functional.labels import class_number

    assert class_number(torch.tensor([float("nan")])) == -1


def test_sixteen_bits_and_other_libraries_are_read_as_their_values():
    values = torch.rand(3, 8, 6)
    expected = hfproj.data.to_rgb_tensor(values.to(torch.bfloat16).float())
    assert torch.equal(hfproj.data.to_rgb_tensor(values.to(torch.bfloat16)), expected)
    pixels = np.arange(144, dtype=np.uint8).reshape(8, 6, 3)
    assert np.array_equal(hfproj.data.to_rgb_tensor(image_inputs.Array(pixels)), pixels.transpose(2, 0, 1))


def test_a_label_of_more_than_64_bits_is_refused_everywhere():
    from hfproj.functional.labels import class_numbers

    for labels in ([10**20], [2**63], np.array([2**63], dtype=np.uint64), torch.tensor([2**63], dtype=torch.uint64)):
        assert_refused(lambda labels=labels: class_numbers(labels), "more than 64")
    assert class_numbers([2**63 - 1, -(2**63)]).tolist() == [2**63 - 1, -(2**63)]


# --- skipping ---


def data(count=12, bad=(2, 7)):
    items = images(count)
    for index in bad:
        items[index]["image"] = BROKEN
    return items


def test_another_image_takes_the_place_of_a_bad_one_by_epoch_and_index_alone():
    dataset = hfproj.IndexedDataset(data(), on_bad_image="skip")
    for epoch in range(3):
        item = dataset[epoch, 7]
        rng, skipped = np.random.default_rng([epoch, 7]), [7]
        while (at := int(rng.integers(12))) in (2, 7):  # the stated rule, written again
            skipped.append(at)
        whole = data()[at]
        assert (item["index"], item["epoch"], item["label"]) == (7, epoch, whole["label"])
        assert np.array_equal(np.asarray(item["image"]), np.asarray(whole["image"]))
        assert [index for index, _ in item[SKIPPED]] == skipped
    assert SKIPPED not in dataset[0, 3]
    assert [item["index"] for item in dataset.__getitems__([(0, 2), (0, 3)])] == [2, 3]
    batch = views()(dataset.__getitems__([(0, 2), (0, 7)]))
    assert {index for index, _ in batch[SKIPPED]} == {2, 7}
    assert batch["index"].tolist() == [2, 7]
    assert "0x" not in str(batch[SKIPPED])  # no address in memory: processes must say the same


def test_a_disk_that_is_gone_is_not_skipped():
    assert_refused(lambda: hfproj.IndexedDataset(data(5, range(5)), on_bad_image="skip")[0], "100 items, drawn")
    with pytest.raises(hfproj.UsageError, match=r"is for a few bad ones\. The last of them: [^=]*$"):
        hfproj.IndexedDataset(data(5, range(5)), on_bad_image="skip")[0]
    assert_refused(lambda: hfproj.IndexedDataset(data(), on_bad_image="drop"), "on_bad_image 'drop'", "raise, skip")
    with pytest.raises(hfproj.UsageError, match="on_bad_image='skip'"):
        views()([hfproj.IndexedDataset(data())[2]])


def test_files_that_a_data_set_decodes_itself_are_skipped_and_named():
    rows = [{"bytes": image_inputs.encoded("PNG", "RGB", i), "path": None} for i in range(6)]
    rows[4] = {"bytes": image_inputs.encoded("JPEG", "RGB")[:300], "path": None}
    features = Features({"image": ImageFeature(), "label": Value("int64")})
    of_images = Dataset.from_dict({"image": rows, "label": range(6)}, features=features)
    assert_refused(lambda: hfproj.IndexedDataset(of_images).__getitems__([3, 4]), "Item 4", "on_bad_image='skip'")
    (item,) = hfproj.IndexedDataset(of_images, on_bad_image="skip").__getitems__([4])
    assert item["label"] != 4
    kept, bad = without_bad_images(of_images)
    assert (kept["label"][:], list(bad)) == ([0, 1, 2, 3, 5], [4])
    whole = images(3)
    assert without_bad_images(whole) == (whole, {})


def test_a_stream_leaves_them_out():
    stream = StreamDataset(data(6, (0, 3)), on_bad_image="skip")
    found = list(stream)
    assert [item["index"] for item in found] == [1, 2, 4, 5]
    assert [[index for index, _ in item.get(SKIPPED, ())] for item in found] == [[0], [], [3], []]

    def broken():
        yield from images(2)
        raise OSError("truncated")

    assert_refused(lambda: list(StreamDataset(broken(), on_bad_image="skip")), "Item 2 of the stream", "decode=False")


def test_the_trainer_counts_lists_and_logs_them(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "hfproj.training"):
        run = trainer(tmp_path, dataset=data(), on_bad_image="skip", num_train_epochs=2)
        run.train()
    assert "2 images can't be read; in place of each comes" in caplog.text
    assert run.state.log_history[-2]["skipped_images"] == 2
    run.create_model_card()
    results = hfproj.Results.load(tmp_path) if (tmp_path / "results.json").exists() else hfproj.Results()
    run.note_skipped(results)
    run.note_skipped(results)  # once
    noted = results.config["skipped_images"]
    assert (noted["count"], [index for index, _ in noted["images"]]) == (2, [2, 7])
    assert sum("could not be read" in note for note in results.notes) == 1
    results.save(tmp_path)
    assert hfproj.Results.load(tmp_path).config["skipped_images"] == noted


def test_training_ends_at_a_bad_image_unless_told_otherwise(tmp_path):
    with pytest.raises(hfproj.UsageError, match=r"cannot be decoded .*\(item [27] of the data set\)"):
        trainer(tmp_path, dataset=data()).train()
    assert_refused(lambda: trainer(tmp_path, on_bad_image="ignore"), "on_bad_image 'ignore'")
    own = lambda items: {"views": [torch.zeros(len(items), 3, 16, 16)] * 2}  # noqa: E731
    assert_refused(lambda: trainer(tmp_path, collator=own, on_bad_image="skip"), "image_column", "function")


def test_an_image_of_other_channels_is_skipped_where_the_collator_could_not_read_it(tmp_path):
    items = [{"image": np.full((16, 16, 4), i, dtype=np.uint8)} for i in range(8)]
    items[5]["image"] = np.zeros((16, 16, 2), dtype=np.uint8)
    four = {"size": 16, "mean": (0.5,) * 4, "std": (0.5,) * 4}
    dataset = hfproj.IndexedDataset(items, on_bad_image="skip", channels=4)
    batch = hfproj.ImageViews(**four, saturation=0, hue=0, grayscale_probability=0)(dataset.__getitems__(range(8)))
    assert {index for index, _ in batch[SKIPPED]} == {5}


def test_text_is_cut_before_it_is_read_and_gives_the_same_tokens():
    tokenizer = image_inputs.tokenizer()
    text = "a b " * 3000
    whole = tokenizer([text], truncation=True, max_length=32)["input_ids"][0]
    seen = []

    class Counting(type(tokenizer)):
        def __call__(self, texts, **options):
            seen.extend(map(len, texts))
            return super().__call__(texts, **options)

    counting = Counting(tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    batch = hfproj.TextViews(counting)([{"text": text, "index": 0}])
    assert batch["views"][0]["input_ids"][0].tolist() == whole
    assert max(seen) == 32 * 256
    assert_refused(
        lambda: hfproj.TextViews(tokenizer)([{"text": "a\ud800", "index": 9}]), "'text' of item 9", "surrogate"
    )


def test_pictures_are_read_from_a_file_too(tmp_path):
    path = tmp_path / "cut.png"
    path.write_bytes(image_inputs.encoded("PNG", "RGB")[:-40])
    with open(path, "rb") as file:
        cut = Image.open(io.BytesIO(file.read()))
    assert_refused(lambda: views()([{"image": cut, "index": 1}]), "truncated", "item 1")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n%%EndComments\n50 50 moveto showpage\n%%EOF\n"


def test_postscript_is_not_run(tmp_path, monkeypatch):
    """A stand-in for Ghostscript in PATH would say that it was started."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\necho started >> {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    (tmp_path / "image.eps").write_bytes(EPS)
    stored = Dataset.from_dict({"image": [{"bytes": EPS, "path": None}]}).cast_column("image", ImageFeature())
    lazy = Image.open(io.BytesIO(EPS))
    for data in ([{"image": {"bytes": EPS, "path": None}}], [{"image": EPS}], [{"image": lazy}], stored):
        with pytest.raises(hfproj.UsageError) as error:
            views()([hfproj.IndexedDataset(data)[0]])
        assert "\n" not in str(error.value)
    assert EpsImagePlugin.gs_binary is None  # and is as it was
    assert not (tmp_path / "started").exists()


def test_what_is_measured_names_the_file_that_cannot_be_read(tmp_path):
    for number in range(4):
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes(b"no picture")
    images = hfproj.load_image_dataset(str(tmp_path))
    backbone = hfproj.load_backbone("vit_nano")
    assert_refused(lambda: hfproj.extract_features(backbone, images), "Item 3", "without_bad_images")
    kept, bad = hfproj.data.without_bad_images(images)
    assert (len(hfproj.extract_features(backbone, kept).h), list(bad)) == (3, [3])
