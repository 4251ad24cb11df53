"""Streams: the same images as when decoded at once, in an order that depends on (seed, step) alone."""

import io
import tarfile
import threading

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from broken_images import BROKEN, encoded
from conftest import one_sentence
from PIL import Image

from ddpm_pipe.data.memory import load_images
from ddpm_pipe.data.stream import StreamBatches, stream_images


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.full((4, 4), number, dtype=np.uint8))


def parquet(path, numbers) -> str:
    """Grey images whose value is their number, labelled by its parity."""
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["even", "odd"]))
    rows = {"image": [picture(n) for n in numbers], "label": [n % 2 for n in numbers]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path / "data.parquet")
    return str(path / "data.parquet")


def numbers(x0: torch.Tensor) -> list[int]:
    return ((x0[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


@pytest.fixture
def stream(tmp_path):
    return stream_images(parquet(tmp_path, range(10)), with_labels=True)


def test_each_epoch_shows_every_image_once_without_gaps(stream):
    batches = StreamBatches(stream, batch_size=4, seed=0)
    drawn = [number for step in range(10) for number in numbers(batches(step, slice(0, 4))[0])]
    epochs = [drawn[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_batch_is_a_function_of_seed_and_step_whatever_was_read_before(stream):
    forward = [numbers(StreamBatches(stream, 4, seed=3)(step, slice(0, 4))[0]) for step in (0, 1, 5)]
    one = StreamBatches(stream, 4, seed=3)
    jumping = [numbers(one(step, slice(0, 4))[0]) for step in (5, 0, 1)]
    assert forward == [*jumping[1:], jumping[0]]
    assert forward[0] != numbers(StreamBatches(stream, 4, seed=4)(0, slice(0, 4))[0])


def test_parts_make_up_the_batch_with_labels(stream):
    whole, labels = StreamBatches(stream, 6, seed=0)(2, slice(0, 6))
    parts = [StreamBatches(stream, 6, seed=0)(2, slice(start, start + 2)) for start in (0, 2, 4)]
    assert torch.equal(whole, torch.cat([x0 for x0, _ in parts]))
    assert torch.equal(labels, torch.cat([part for _, part in parts]))
    assert labels.tolist() == [number % 2 for number in numbers(whole)]


def test_held_out_images_are_not_trained_on(stream):
    train, held_out = stream.hold_out(3, seed=0)
    assert held_out.images[:, 0, 0, 0].tolist() == [0, 1, 2] and held_out.labels.tolist() == [0, 1, 0]
    drawn = numbers(StreamBatches(train, 14, seed=0)(0, slice(0, 14))[0])
    assert set(drawn) == set(range(3, 10))


def test_webdataset_shards_give_the_same_images_streamed_or_not(tmp_path):
    for shard in range(2):
        with tarfile.open(tmp_path / f"shard-{shard}.tar", "w") as tar:
            for number in range(5 * shard, 5 * shard + 5):
                content = io.BytesIO()
                picture(number).save(content, "PNG")
                entry = tarfile.TarInfo(f"{number:04d}.png")
                entry.size = content.tell()
                tar.addfile(entry, io.BytesIO(content.getvalue()))
    shards = str(tmp_path / "shard-*.tar")
    assert load_images(shards).images[:, 0, 0, 0].tolist() == list(range(10))
    batches = StreamBatches(stream_images(shards), 10, seed=0)
    assert sorted(numbers(batches(0, slice(0, 10))[0])) == list(range(10))


def raw_parquet(path, *contents: bytes | None) -> str:
    """Image files in a table written without datasets."""
    cells = [{"bytes": content, "path": None} for content in contents]
    column = pyarrow.array(cells, pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}))
    pyarrow.parquet.write_table(pyarrow.table({"image": column}), path / "data.parquet")
    return str(path / "data.parquet")


@pytest.mark.parametrize("kind", BROKEN)
def test_whatever_a_decoder_raises_an_image_gives_way_to_the_next_one_and_is_reported(tmp_path, kind):
    whole = [encoded(picture(number)) for number in range(4)]
    stream = stream_images(raw_parquet(tmp_path, *whole[:2], BROKEN[kind], whole[3]))
    with pytest.warns(UserWarning, match="unreadable image 1 of the stream"):
        images, _ = stream.decode(list(stream.rows))
    assert images[:, 0, 0, 0].tolist() == [0, 1, 3, 3]
    assert len(stream.skipped) == 1


@pytest.mark.filterwarnings("ignore:unreadable image")
@pytest.mark.parametrize("broken", [(2,), (0, 1, 2, 3, 4, 5), (7, 8, 9), (0, 3, 4, 9)])
def test_broken_images_leave_the_order_of_the_rest_and_no_step_without_images(tmp_path, broken):
    contents = [encoded(picture(number)) for number in range(10)]
    stream = stream_images(raw_parquet(tmp_path, *contents))
    order = [number for step in range(10) for number in numbers(StreamBatches(stream, 4, seed=0)(step, slice(0, 4))[0])]
    for number in broken:
        contents[number] = b"no picture"
    damaged = stream_images(raw_parquet(tmp_path, *contents))
    drawn = [number for step in range(5) for number in numbers(StreamBatches(damaged, 4, seed=0)(step, slice(0, 4))[0])]
    assert drawn == [next(number for number in order[place:] if number not in broken) for place in range(20)]


@pytest.mark.filterwarnings("ignore:unreadable image")
def test_parts_make_up_the_batch_where_images_are_broken(tmp_path):
    contents = [b"no picture" if number % 3 else encoded(picture(number)) for number in range(30)]
    stream = stream_images(raw_parquet(tmp_path, *contents))
    whole, parts = StreamBatches(stream, 6, seed=0), StreamBatches(stream, 6, seed=0)
    for step in (0, 1, 2, 7, 3):
        drawn = [numbers(parts(step, slice(place, place + 1))[0]) for place in range(6)]
        assert [number for (number,) in drawn] == numbers(whole(step, slice(0, 6))[0])


@pytest.mark.filterwarnings("ignore:unreadable image")
def test_a_stream_of_broken_images_is_given_up_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm_pipe.data.stream.PATIENCE", 8)
    contents = [encoded(picture(0))] + [b"no picture"] * 50
    train, _ = stream_images(raw_parquet(tmp_path, *contents)).hold_out(1, seed=0)
    with one_sentence(match=r"an image of the stream and the next 8 cannot be read; the last: no path"):
        StreamBatches(train, 4, seed=0)(0, slice(0, 4))


def test_the_first_readable_image_tells_size_and_channels(tmp_path):
    contents = [None, b"no picture", encoded(picture(0))]
    assert stream_images(raw_parquet(tmp_path, *contents)).shape == (1, 4, 4)
    with pytest.raises(
        ValueError, match="no image that can be read in 2 rows; the first is no path: there is no image"
    ):
        stream_images(raw_parquet(tmp_path, *contents[:2]))


@pytest.mark.parametrize("missing", [None, -1, 2])
def test_a_row_without_the_label_of_a_class_gives_way_to_the_next_one(tmp_path, missing):
    stream = stream_images(parquet(tmp_path, range(4)), with_labels=True)
    rows = [row | {"label": missing if number == 1 else number // 3} for number, row in enumerate(stream.rows)]
    with pytest.warns(UserWarning, match=rf"there is no label of a class \({missing}\)"):
        images, labels = stream.decode(rows)
    assert images[:, 0, 0, 0].tolist() == [0, 2, 2, 3] and labels.tolist() == [0, 0, 0, 1]


@pytest.mark.filterwarnings("ignore:unreadable image")
def test_broken_images_are_not_held_out(tmp_path):
    contents = [encoded(picture(number)) for number in range(6)]
    contents[1] = b"no picture"
    train, held_out = stream_images(raw_parquet(tmp_path, *contents)).hold_out(3, seed=0)
    assert held_out.images[:, 0, 0, 0].tolist() == [0, 2]
    assert set(numbers(StreamBatches(train, 6, seed=0)(0, slice(0, 6))[0])) == {3, 4, 5}


@pytest.mark.parametrize(
    ("count", "sentence"),
    [
        (10, "holdout=10 must leave some of the 10 images to train on"),
        (11, "holdout=11 must leave some of the 10 images to train on"),
        (-1, "holdout=-1 must be at least 0"),
        (10**15, "holdout=1000000000000000: ... GiB of memory, and"),
    ],
)
def test_a_holdout_that_leaves_nothing_is_one_sentence(stream, count, sentence):
    with one_sentence(*sentence.split(" ... ")):
        stream.hold_out(count, seed=0)


def test_a_stream_whose_rows_are_gone_ends_in_one_sentence(stream):
    stream.rows = stream.rows.skip(10)
    with one_sentence(match="the stream has no rows to train on"):
        StreamBatches(stream, 4, seed=0)(0, slice(0, 4))


def test_a_file_that_breaks_off_while_it_is_streamed_is_one_sentence(tmp_path):
    rng = np.random.default_rng(0)
    contents = [encoded(Image.fromarray(rng.integers(0, 256, (64, 64), np.uint8))) for _ in range(40)]
    path = raw_parquet(tmp_path, *contents)
    stream = stream_images(path)
    with open(path, "r+b") as file:
        file.seek(4)
        file.write(rng.bytes(2000))
    with one_sentence(match="the stream could not be read"):
        StreamBatches(stream, 4, seed=0)(0, slice(0, 4))


def test_other_sizes_are_made_to_fit_the_first(tmp_path):
    table = datasets.Dataset.from_dict({"image": [picture(1), picture(2).resize((8, 6))]})
    table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "data.parquet")
    stream = stream_images(str(tmp_path / "data.parquet"))
    assert stream.shape == (1, 4, 4)
    assert stream.decode(list(stream.rows))[0].shape == (2, 1, 4, 4)
    assert stream_images(str(tmp_path / "data.parquet"), resolution=[2], channels=3).shape == (3, 2, 2)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"image_column": "picture"}, "image_column='picture' is not in the data"),
        ({"with_labels": True, "label_column": "number"}, "label_column='number' must be of the class-label type"),
        ({"split": "dev"}, "split='dev' could not be read"),
        ({"resolution": [10**6]}, "resolution=[1000000] ... GiB of memory, and"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, options, sentence):
    table = datasets.Dataset.from_dict({"image": [picture(1)], "number": [1]}).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "train-0.parquet")
    with one_sentence(*sentence.split(" ... ")):
        stream_images(str(tmp_path), **options)


def test_the_next_step_is_read_while_the_network_is_at_work(stream, monkeypatch):
    read, decode = threading.Semaphore(0), type(stream).decode

    def counted(self, *rows):
        read.release()
        return decode(self, *rows)

    monkeypatch.setattr(type(stream), "decode", counted)
    batches = StreamBatches(stream, 4, seed=0)
    batches(0, slice(0, 4))
    assert all(read.acquire(timeout=60) for _ in range(2))  # that of step 1 without being asked for it
    batches(1, slice(0, 4))
    assert read.acquire(timeout=60) and not read.acquire(blocking=False)  # that of step 2; of step 1 not again


def test_parts_of_a_step_are_those_of_the_whole_while_the_next_is_read(stream):
    whole, parts = StreamBatches(stream, 6, seed=0), StreamBatches(stream, 6, seed=0)
    for step in (0, 1, 2, 1, 7):
        drawn = [numbers(parts(step, slice(start, start + 3))[0]) for start in (0, 3)]
        assert [*drawn[0], *drawn[1]] == numbers(whole(step, slice(0, 6))[0])
