import io
import pickle

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import IterableDatasetShard, skip_first_batches
from PIL import Image
from torch.utils.data import DataLoader

from hfproj import UsageError
from hfproj.data import EpochSampler, ImageViews, IndexedDataset, StreamDataset

RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, (12, 12, 3), dtype=np.uint8) for _ in range(12)]
ITEMS = [{"image": image, "label": i % 3} for i, image in enumerate(IMAGES)]


def views_of(loader):
    """All views of an epoch, by index."""
    found = {}
    for batch in loader:
        for row, index in enumerate(batch["index"].tolist()):
            found[index] = torch.stack([view[row] for view in batch["views"]])
    return found


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[i], b[i]) for i in a)


def collator():
    return ImageViews(size=8, mean=(0.5,) * 3, std=(0.5,) * 3, seed=1)


class Pairs(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, i):
        return "image", 7


def test_items_hold_index_and_epoch():
    assert IndexedDataset(Pairs())[3, 1] == {"image": "image", "label": 7, "index": 1, "epoch": 3}
    assert IndexedDataset(["a", "b"])[1] == {"image": "b", "index": 1, "epoch": 0}
    assert IndexedDataset([{"x": 1, "index": 99}])[0] == {"x": 1, "index": 0, "epoch": 0}
    assert IndexedDataset(["a", "b"])[np.int64(-1)]["index"] == 1
    with pytest.raises(IndexError):
        IndexedDataset(["a"])[1]


def test_item_is_a_copy():
    items = [{"x": 1}]
    IndexedDataset(items)[0]["y"] = 2
    assert items == [{"x": 1}]


def test_hf_dataset_read_at_once_equals_one_by_one():
    wrapped = IndexedDataset(datasets.Dataset.from_dict({"text": list("abcd")}))
    keys = [(2, 3), (2, 0), (1, 1)]
    assert wrapped.__getitems__(keys) == [wrapped[key] for key in keys]
    assert wrapped[2, 3] == {"text": "d", "index": 3, "epoch": 2}


def test_tuples_of_three_and_streams_are_refused():
    with pytest.raises(UsageError, match="got a tuple of 3"):
        IndexedDataset([(1, 2, 3)])[0]
    with pytest.raises(UsageError, match="StreamDataset"):
        IndexedDataset(iter([1]))


def test_unreadable_image_names_its_index():
    buffer = io.BytesIO()
    Image.fromarray(IMAGES[0]).save(buffer, "png")
    good, cut = buffer.getvalue(), buffer.getvalue()[:200]
    data = datasets.Dataset.from_dict(
        {"image": [{"bytes": b, "path": None} for b in (good, good, cut)]},
        features=datasets.Features({"image": datasets.Image()}),
    )
    for read in (lambda d: d[2], lambda d: d.__getitems__([0, 2])):
        with pytest.raises(UsageError, match="Item 2 of the data set cannot be read"):
            read(IndexedDataset(data))


def test_order_depends_on_seed_and_epoch_only():
    def order(seed, epoch):
        sampler = EpochSampler(50, seed=seed)
        sampler.set_epoch(epoch)
        torch.rand(3)
        return [index for _, index in sampler]

    assert order(0, 1) == order(0, 1)
    assert sorted(order(0, 1)) == list(range(50))
    # Neither another epoch nor a neighbouring seed repeats a permutation.
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert len(EpochSampler(50)) == 50
    with pytest.raises(UsageError, match="at least one item"):
        EpochSampler(0)


def test_sampler_has_no_generator_for_accelerate_to_take():
    assert not hasattr(EpochSampler(3), "generator")


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_do_not_change_views_and_epochs_do(persistent):
    def epochs(workers):
        loader = Accelerator(cpu=True).prepare(
            DataLoader(
                IndexedDataset(ITEMS),
                batch_size=5,
                sampler=EpochSampler(len(ITEMS), seed=3),
                collate_fn=collator(),
                num_workers=workers,
                persistent_workers=persistent and workers > 0,
            )
        )
        assert isinstance(loader.batch_sampler.sampler, EpochSampler)
        found = []
        for epoch in (1, 2):
            loader.set_epoch(epoch)
            found.append(views_of(loader))
        return found

    first, second = epochs(0)
    assert len(first) == len(ITEMS)
    assert not any(torch.equal(first[i], second[i]) for i in first)
    assert all(same(a, b) for a, b in zip(epochs(2), (first, second)))


def test_views_of_several_processes_are_those_of_one():
    from accelerate.data_loader import prepare_data_loader

    def loader(rank, world):
        data = DataLoader(
            IndexedDataset(ITEMS), batch_size=12 // world // 2, sampler=EpochSampler(12), collate_fn=collator()
        )
        return prepare_data_loader(data, num_processes=world, process_index=rank, put_on_device=False)

    found = {}
    for rank in (0, 1):
        shard = loader(rank, 2)
        shard.set_epoch(4)
        if hasattr(shard.batch_sampler, "batch_sampler"):
            assert shard.batch_sampler.batch_sampler.sampler.epoch == 4
        found.update(views_of(shard))
    alone = loader(0, 1)
    alone.set_epoch(4)
    assert same(found, views_of(alone))


def test_skipping_batches_leaves_the_rest_as_it_was():
    loader = Accelerator(cpu=True).prepare(
        DataLoader(IndexedDataset(ITEMS), batch_size=4, sampler=EpochSampler(12), collate_fn=collator())
    )
    loader.set_epoch(3)
    whole = views_of(loader)
    skipping = skip_first_batches(loader, 2)
    skipping.set_epoch(3)
    rest = views_of(skipping)
    assert len(rest) == 4
    assert same(rest, {index: whole[index] for index in rest})


def test_stream_counts_positions_and_passes_the_epoch_on():
    source = datasets.Dataset.from_dict({"x": list(range(20))}).to_iterable_dataset(num_shards=4).shuffle(seed=0)
    stream = StreamDataset(source)
    orders = []
    for epoch in (0, 1):
        stream.set_epoch(epoch)
        items = list(stream)
        assert [item["index"] for item in items] == list(range(20))
        assert {item["epoch"] for item in items} == {epoch}
        orders.append([item["x"] for item in items])
    assert orders[0] != orders[1]
    assert pickle.loads(pickle.dumps(StreamDataset([1]))).set_epoch(2) is None


@pytest.mark.parametrize("workers", [0, 1])
def test_stream_shares_of_processes_keep_global_positions(workers):
    stream = StreamDataset(ITEMS)
    stream.set_epoch(5)
    alone = views_of(DataLoader(stream, batch_size=4, collate_fn=collator(), num_workers=workers))
    found = {}
    for rank in (0, 1):
        share = IterableDatasetShard(stream, batch_size=2, num_processes=2, process_index=rank)
        found.update(views_of(DataLoader(share, batch_size=2, collate_fn=collator(), num_workers=workers)))
    assert len(alone) == 12
    assert same(found, alone)


def test_persistent_stream_worker_sees_the_new_epoch():
    stream = StreamDataset(ITEMS)
    loader = Accelerator(cpu=True).prepare(
        DataLoader(stream, batch_size=4, collate_fn=collator(), num_workers=1, persistent_workers=True)
    )
    for epoch in (1, 2):
        loader.set_epoch(epoch)
        expected = DataLoader(IndexedDataset(ITEMS), sampler=[(epoch, i) for i in range(12)], collate_fn=collator())
        assert same(views_of(loader), views_of(expected))


def test_stream_refuses_two_workers():
    with pytest.raises(UsageError, match="Set dataloader_num_workers to 0 or 1"):
        list(DataLoader(StreamDataset(ITEMS), num_workers=2, collate_fn=collator()))
