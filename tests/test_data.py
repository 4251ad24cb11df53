"""Images in, uint8 tensors out; order as a function of the seed; every bad input one sentence."""

import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import PIL
import pyarrow
import pyarrow.parquet
import pytest
import torch
from broken_images import BROKEN, encoded
from conftest import one_sentence
from PIL import Image

from ddpm_pipe.data.images import Unreadable, attempt, map_cells, open_image, to_array, to_unit_range
from ddpm_pipe.data.memory import Batches, ImageData, load_images
from ddpm_pipe.data.stream import stream_images

RED, GREY = (200, 30, 40), 90


def image(mode: str = "RGB", size: tuple[int, int] = (8, 6), seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def folder(path: Path, *images: Image.Image, suffix: str = "png") -> str:
    path.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(images):
        picture.save(path / f"{i}.{suffix}")
    return str(path)


def raw_parquet(path: Path, *contents: bytes | None) -> str:
    """Image files in a table written without datasets."""
    return cells_parquet(path, *({"bytes": content, "path": None} for content in contents))


def cells_parquet(path: Path, *cells: dict) -> str:
    """Cells of an image column in such a table."""
    column = pyarrow.array(cells, pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}))
    pyarrow.parquet.write_table(pyarrow.table({"image": column}), path)
    return str(path)


def pixels(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture).reshape(picture.height, picture.width, -1)).permute(2, 0, 1)


# ---------------------------------------------------------------- where images come from


def test_folder_of_images_is_read_pixel_for_pixel(tmp_path):
    originals = [image(seed=i) for i in range(5)]
    data = load_images(folder(tmp_path, *originals))
    assert data.images.dtype == torch.uint8
    assert torch.equal(data.images, torch.stack([pixels(picture) for picture in originals]))


def test_a_zip_file_of_images_is_read_pixel_for_pixel(tmp_path):
    originals = [image(seed=i) for i in range(5)]
    file = shutil.make_archive(str(tmp_path / "images"), "zip", folder(tmp_path / "images", *originals))
    expected = torch.stack([pixels(picture) for picture in originals])
    assert torch.equal(load_images(file).images, expected)
    stream = stream_images(file, resolution=[6, 8], channels=3)
    assert stream.shape == (3, 6, 8)


def test_class_subfolders_become_labels(tmp_path):
    for name, count in (("cat", 2), ("dog", 3)):
        folder(tmp_path / name, *[image() for _ in range(count)])
    data = load_images(str(tmp_path), with_labels=True)
    assert data.class_names == ("cat", "dog")
    assert data.labels.tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("load", [load_images, stream_images])
def test_classes_that_are_not_used_are_named_before_training(tmp_path, load):
    for name in ("cat", "dog"):
        folder(tmp_path / name, image())
    assert load(str(tmp_path), with_labels=True).notes()[-1] == "2 classes: cat, dog"
    unused = "2 classes that this run does not use; class_conditional true trains with them: cat, dog"
    assert load(str(tmp_path)).notes()[-1] == unused
    assert not any("class" in line for line in load(folder(tmp_path / "cat", image())).notes())


@pytest.mark.parametrize(
    "form", ["parquet", "arrow", "save_to_disk", "dataset_dict", "folder_of_parquet", "raw_parquet"]
)
def test_every_form_gives_the_same_images(tmp_path, form):
    pictures = [image(seed=i) for i in range(4)]
    table = datasets.Dataset.from_dict(
        {"number": [3, 1, 2, 0], "picture": pictures},
        features=datasets.Features(number=datasets.Value("int64"), picture=datasets.Image()),
    )
    path = tmp_path / "data"
    if form == "parquet":
        table.to_parquet(path := path.with_suffix(".parquet"))
    elif form == "folder_of_parquet":
        path.mkdir()
        table.to_parquet(path / "train-00000.parquet")
    elif form == "raw_parquet":  # as written by pandas: no feature says that the column holds images
        raw = (
            table.cast_column("picture", datasets.Image(decode=False))
            .with_format("arrow")[:]
            .replace_schema_metadata(None)
        )
        pyarrow.parquet.write_table(raw, path := path.with_suffix(".parquet"))
    elif form == "dataset_dict":
        datasets.DatasetDict(train=table).save_to_disk(path)
    else:
        table.save_to_disk(path)
        path = next(path.glob("*.arrow")) if form == "arrow" else path
    data = load_images(str(path))
    assert data.column == "picture"
    assert torch.equal(data.images, torch.stack([pixels(picture) for picture in pictures]))


def test_labels_of_integers_or_strings_are_numbered_by_name(tmp_path):
    table = datasets.Dataset.from_dict({"image": [image()] * 4, "kind": ["b", "a", "b", "c"]}).cast_column(
        "image", datasets.Image()
    )
    table.to_parquet(tmp_path / "data.parquet")
    data = load_images(str(tmp_path / "data.parquet"), with_labels=True, label_column="kind")
    assert data.class_names == ("a", "b", "c")
    assert data.labels.tolist() == [1, 0, 1, 2]


def test_bundled_images():
    bundled = Path(__file__).parent.parent / "examples" / "fashion_mnist"
    data = load_images(str(bundled), "test", with_labels=True)
    assert data.images.shape == (1000, 1, 28, 28)
    assert data.labels.bincount().tolist() == [100] * 10
    assert (bundled / "LICENSE").is_file()


# ---------------------------------------------------------------- rules of conversion


def test_sixteen_bit_greys_are_scaled_to_eight():
    values = np.array([[0, 257, 65535, 32768]], dtype=np.uint16)
    assert to_array(Image.fromarray(values), 1, (1, 4)).tolist() == [[[0, 1, 255, 128]]]


def test_floats_are_greys_from_0_to_1():
    values = np.array([[0, 0.25, 1, 0.5]], dtype=np.float32)
    assert to_array(Image.fromarray(values), 1, (1, 4)).tolist() == [[[0, 64, 255, 128]]]


@pytest.mark.parametrize("values", [[0, 255], [-0.1, 1], [0, float("nan")], [0, float("inf")]])
def test_floats_outside_0_to_1_are_refused_and_not_guessed_at(values):
    with pytest.raises(ValueError, match="outside the range 0 to 1 of their type"):
        to_array(Image.fromarray(np.array([values], dtype=np.float32)), 1, (1, 2))


def test_integers_beyond_16_bits_are_refused():
    with pytest.raises(ValueError, match="0 to 70000, lie outside the range 0 to 65535"):
        to_array(Image.fromarray(np.array([[0, 70_000]], dtype=np.int32)), 1, (1, 2))


def test_transparency_is_laid_over_white_unless_four_channels_are_asked_for():
    picture = Image.new("RGBA", (2, 2), (*RED, 128))
    over_white = [round((value * 128 + 255 * 127) / 255) for value in RED]
    assert np.abs(to_array(picture, 3, (2, 2))[:, 0, 0].astype(int) - over_white).max() <= 1
    assert to_array(picture, 4, (2, 2))[:, 0, 0].tolist() == [*RED, 128]


def test_palette_and_cmyk_become_rgb():
    palette = Image.new("RGB", (2, 2), RED).quantize(4)
    cmyk = Image.new("CMYK", (2, 2), (0, 255, 255, 0))
    assert np.abs(to_array(palette, 3, (2, 2))[:, 0, 0].astype(int) - RED).max() <= 8
    assert to_array(cmyk, 3, (2, 2))[:, 0, 0].tolist() == [255, 0, 0]


def test_exif_orientation_is_applied(tmp_path):
    picture = image(size=(8, 6))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    picture.save(tmp_path / "turned.png", exif=exif)
    data = load_images(str(tmp_path))
    assert torch.equal(data.images[0], pixels(picture.transpose(Image.Transpose.ROTATE_270)))


def test_resize_keeps_the_centre():
    picture = Image.new("L", (30, 10))
    picture.paste(255, (10, 0, 20, 10))  # the middle third is white
    assert to_array(picture, 1, (10, 10)).min() == 255


def test_height_and_width_may_differ(tmp_path):
    data = load_images(folder(tmp_path, image(size=(20, 20))), resolution=[4, 7])
    assert data.shape == (3, 4, 7)


def test_grey_images_have_one_channel_and_coloured_ones_three(tmp_path):
    assert load_images(folder(tmp_path / "grey", image("L"), image("1"))).shape[0] == 1
    assert load_images(folder(tmp_path / "colour", image("RGB"), image("P"))).shape[0] == 3


def test_unit_range_maps_black_to_minus_one_and_white_to_one():
    assert to_unit_range(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


# ---------------------------------------------------------------- bad input


def test_corrupt_images_are_skipped_and_listed(tmp_path):
    path = folder(tmp_path, *[image(seed=i) for i in range(4)])
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "2.png").write_bytes(b"no picture")
    data = load_images(path)
    assert len(data) == 2
    assert data.summary() == "2 images per epoch, 8x6, 3 channels, from column 'image'"
    told = "\n".join(data.notes())
    assert "2 unreadable images skipped:" in told and "1.png" in told and "2.png" in told
    images, _ = data.take(torch.arange(2))
    assert torch.equal(images[1], pixels(image(seed=3)))


@pytest.mark.parametrize("kind", BROKEN)
def test_whatever_a_decoder_raises_skips_that_image_alone(tmp_path, kind):
    whole = [image(seed=i) for i in range(3)]
    contents = [encoded(whole[0]), BROKEN[kind], encoded(whole[1]), encoded(whole[2])]
    data = load_images(raw_parquet(tmp_path / "data.parquet", *contents))
    assert data.rows.tolist() == [0, 2, 3] and data.skipped[0].startswith("row 1: ")
    assert torch.equal(data.take(torch.arange(3))[0], torch.stack([pixels(picture) for picture in whole]))


@pytest.mark.parametrize("kind", BROKEN)
def test_the_first_image_may_be_a_broken_one(tmp_path, kind):
    file = raw_parquet(tmp_path / "data.parquet", BROKEN[kind], encoded(image(size=(5, 4))))
    data = load_images(file)
    assert data.shape == stream_images(file).shape == (3, 4, 5) and len(data) == 1


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_what_is_not_the_fault_of_the_file_is_not_skipped(error):
    def decode(cell):
        raise error

    with pytest.raises(error):
        attempt(decode, {"bytes": b"", "path": None})


def _mixed_sizes(path):
    return {"data": folder(path, image(size=(8, 8)), image(size=(9, 8)))}


def _mixed_modes(path):
    return {"data": folder(path, image("RGB"), image("L"))}


def _all_corrupt(path):
    (path / "a.png").write_bytes(b"no picture")
    return {"data": str(path)}


def _no_images(path):
    (path / "notes.txt").write_text("nothing to see")
    return {"data": str(path)}


def _two_image_columns(path):
    table = datasets.Dataset.from_dict({"a": [image()], "b": [image()]})
    table = table.cast_column("a", datasets.Image()).cast_column("b", datasets.Image())
    table.to_parquet(path / "x.parquet")
    return {"data": str(path / "x.parquet")}


@pytest.mark.parametrize(
    ("arrange", "options", "sentence"),
    [
        (lambda path: {"data": str(path)}, {}, "folder without images"),
        (lambda path: {"data": str(path / "missing.parquet")}, {}, "neither a file nor a folder"),
        (_no_images, {}, "none of its columns holds images"),
        (_two_image_columns, {}, "several columns hold images: a, b"),
        (_all_corrupt, {}, "no image that can be read"),
        (_mixed_sizes, {}, "2 different sizes ... resolution"),
        (_mixed_modes, {}, "1 images are grey and 1 are coloured ... channels=1"),
        (_mixed_sizes, {"resolution": [0]}, "resolution=[0] must be one size ... at least 1"),
        (_mixed_sizes, {"resolution": [1, 2, 3]}, "resolution=[1, 2, 3] must be one size or a height and a width"),
        (_mixed_modes, {"channels": 2}, "channels=2 must be 1"),
        (_mixed_modes, {"image_column": "picture"}, "image_column='picture' is not in the data ... image"),
        (_mixed_modes, {"label_column": "kind", "with_labels": True}, "label_column='kind' is not in the data"),
        (_mixed_modes, {"with_labels": True}, "0 columns hold class labels"),
        (_mixed_modes, {"split": "dev"}, "split='dev' could not be read: Unknown split"),
        (_mixed_modes, {"resolution": [10**6]}, "resolution=[1000000] ... GiB of memory, and"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, arrange, options, sentence):
    with one_sentence(*sentence.split(" ... ")):
        load_images(**arrange(tmp_path), **options)


# ---------------------------------------------------------------- memory


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty datasets cache for what is memory-mapped."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "ddpm_pipe"


def decoded(cache: Path) -> int:
    """Files of decoded images in the cache."""
    return len(list(cache.glob("*.npy")))


def test_a_path_that_no_file_can_have_is_skipped_in_a_memory_mapped_file_too(tmp_path, cache):
    cells = [{"bytes": None, "path": "a\0b"}, {"bytes": encoded(image()), "path": None}]
    data = cells_parquet(tmp_path / "data.parquet", *cells)
    assert load_images(data).rows.tolist() == load_images(data, max_memory=0).rows.tolist() == [1]


def test_memory_mapped_images_are_the_same_and_are_decoded_once(tmp_path, cache):
    path = folder(tmp_path / "images", *[image(seed=i) for i in range(4)])
    (tmp_path / "images" / "2.png").write_bytes(b"no picture")
    in_memory, mapped = load_images(path), load_images(path, max_memory=0)
    assert mapped.memory_mapped and not in_memory.memory_mapped
    assert torch.equal(mapped.images, in_memory.images) and torch.equal(mapped.rows, in_memory.rows)
    (file,) = cache.glob("*.npy")
    written = file.stat()
    again = load_images(path, max_memory=0)
    assert torch.equal(again.images, mapped.images) and again.skipped == mapped.skipped
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)


def test_what_is_decoded_otherwise_is_decoded_again(tmp_path, cache, monkeypatch):
    path = folder(tmp_path / "images", image(seed=0), image(seed=1))
    load_images(path, max_memory=0)
    image(seed=2).save(tmp_path / "images" / "1.png")
    assert torch.equal(load_images(path, max_memory=0).images[1], pixels(image(seed=2)))
    assert decoded(cache) == 2
    load_images(path, channels=3, max_memory=0)  # the same pixels, but grey images would be taken too
    assert decoded(cache) == 3
    monkeypatch.setattr(PIL, "__version__", "0")
    load_images(path, max_memory=0)
    assert decoded(cache) == 4
    monkeypatch.setattr("ddpm_pipe.data.memory.DECODING", 0)
    load_images(path, max_memory=0)
    assert decoded(cache) == 5


def test_sizes_that_were_resized_for_another_run_are_still_mixed(tmp_path, cache):
    path = folder(tmp_path / "images", image(size=(8, 6)), image(size=(9, 6)))
    load_images(path, resolution=[6, 8], max_memory=0)
    with pytest.raises(ValueError, match="2 different sizes"):
        load_images(path, max_memory=0)


@pytest.mark.parametrize("damage", ["shorter", "empty", "no notes", "shorter notes"])
def test_a_damaged_file_of_decoded_images_is_made_again(tmp_path, cache, damage):
    path = folder(tmp_path / "images", *[image(seed=i) for i in range(4)])
    whole = load_images(path, max_memory=0).images.clone()
    (file,) = cache.glob("*.npy")
    notes = file.with_suffix(".json")
    if "notes" in damage:
        np.load(file, mmap_mode="r+")[:] = 0
        os.truncate(notes, 1) if damage == "shorter notes" else notes.unlink()
    else:
        os.truncate(file, {"shorter": file.stat().st_size - 1, "empty": 0}[damage])
    assert torch.equal(load_images(path, max_memory=0).images, whole)


DECODER = """
import sys, time
from pathlib import Path
from ddpm_pipe.data import memory

signs, count = Path(sys.argv[2]), 0

def to_array(*args, decode=memory.to_array):
    global count
    count += 1
    if count == 3:
        signs.with_suffix(".waiting").touch()
        while not signs.with_suffix(".go").exists():
            time.sleep(0.01)
    return decode(*args)

memory.to_array = to_array
memory.load_images(sys.argv[1], max_memory=0)
"""
"""A process that decodes a folder into the cache, and waits at the third image until it is told to go on."""


@pytest.fixture
def decoders(tmp_path, cache):
    """Starts such processes by name, and ends them."""
    processes = []

    def start(path: str, name: str) -> subprocess.Popen:
        environment = os.environ | {"HF_DATASETS_CACHE": str(cache.parent)}
        command = [sys.executable, "-c", DECODER, path, str(tmp_path / name)]
        with (tmp_path / f"{name}.log").open("w") as log:
            processes.append(subprocess.Popen(command, env=environment, stderr=log))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def wait_for(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_second_run_neither_overwrites_nor_repeats_what_the_first_decodes(tmp_path, decoders):
    path = folder(tmp_path / "images", *[image(seed=i) for i in range(8)])
    in_memory = load_images(path).images
    first = decoders(path, "first")
    wait_for((tmp_path / "first.waiting").exists)
    second = decoders(path, "second")
    decodes, log = tmp_path / "second.waiting", tmp_path / "second.log"
    wait_for(lambda: decodes.exists() or "waits for it" in log.read_text())
    (tmp_path / "first.go").touch()
    assert first.wait(120) == 0
    if decodes.exists():  # it decodes into the file that the first one has finished
        second.kill()
    second.wait(120)
    assert torch.equal(load_images(path, max_memory=0).images, in_memory)
    assert not decodes.exists() and second.returncode == 0


def test_a_run_killed_while_decoding_leaves_nothing_that_passes_for_images(tmp_path, decoders, cache):
    path = folder(tmp_path / "images", *[image(seed=i) for i in range(8)])
    first = decoders(path, "first")
    wait_for((tmp_path / "first.waiting").exists)
    first.kill()
    first.wait()
    assert decoded(cache) == 0
    assert torch.equal(load_images(path, max_memory=0).images, load_images(path).images)


def test_images_that_the_disk_has_no_room_for_are_one_sentence(tmp_path, cache):
    free = shutil.disk_usage(tmp_path).free
    count = 2 + free // 2048**2
    path = raw_parquet(tmp_path / "data.parquet", *[encoded(Image.new("L", (1, 1)))] * count)
    with one_sentence(match=r"cannot be kept in .*: they take .* GiB, and .* GiB are free"):
        load_images(path, resolution=[2048], max_memory=0)
    assert not any(file.suffix in (".npy", ".new") for file in cache.iterdir())


def test_a_disk_that_fills_up_is_one_sentence(tmp_path, cache):
    path = folder(tmp_path / "images", *[image(size=(128, 128), seed=i) for i in range(4)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with one_sentence(match="cannot be kept in"):
            load_images(path, max_memory=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(load_images(path, max_memory=0)) == 4


def numbered(count: int, **kwargs) -> ImageData:
    """Images of one pixel whose value is their number."""
    return ImageData(torch.arange(count, dtype=torch.uint8).view(count, 1, 1, 1), torch.arange(count), **kwargs)


def test_held_out_images_are_disjoint_complete_and_follow_the_seed():
    train, held_out = numbered(20).hold_out(6, seed=1)
    assert len(train) == 14 and len(held_out) == 6
    assert sorted(train.rows.tolist() + held_out.rows.tolist()) == list(range(20))
    assert torch.equal(numbered(20).hold_out(6, seed=1)[1].rows, held_out.rows)
    assert not torch.equal(numbered(20).hold_out(6, seed=2)[1].rows, held_out.rows)
    with pytest.raises(ValueError, match="holdout=20 must leave some of the 20 images"):
        numbered(20).hold_out(20, seed=1)


# ---------------------------------------------------------------- batches


def test_each_epoch_shows_every_image_once_without_gaps():
    batches = Batches(numbered(10), batch_size=4, seed=0)
    drawn = torch.cat([batches.positions(step) for step in range(15)])
    for epoch in drawn.view(6, 10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert not torch.equal(drawn[:10], drawn[10:20])


def test_a_batch_is_a_function_of_seed_and_step_alone():
    forward = [Batches(numbered(10), 4, seed=3).positions(step) for step in range(8)]
    one = Batches(numbered(10), 4, seed=3)
    backward = [one.positions(step) for step in reversed(range(8))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward))
    assert not torch.equal(forward[0], Batches(numbered(10), 4, seed=4).positions(0))


def test_parts_of_a_batch_make_up_the_batch():
    data = ImageData(torch.randint(0, 256, (12, 3, 4, 4), dtype=torch.uint8), torch.arange(12), labels=torch.arange(12))
    batches = Batches(data, batch_size=8, seed=0)
    whole, labels = batches(5, slice(0, 8))
    parts = [batches(5, slice(start, start + 2)) for start in range(0, 8, 2)]
    assert torch.equal(whole, torch.cat([part for part, _ in parts]))
    assert torch.equal(labels, torch.cat([part for _, part in parts]))


@pytest.mark.parametrize("where", ["in memory", "on disk", "in a zip file"])
def test_small_and_large_files_come_out_in_their_order_and_what_fails_stands_in_its_place(tmp_path, where):
    pictures = [image(size=(size, size), seed=i) for i, size in enumerate([8, 200] * 20)]
    if where == "in memory":
        cells = [{"bytes": encoded(picture), "path": None} for picture in pictures]
    else:
        top = folder(tmp_path / "images", *pictures)
        name = "{}/{}.png" if where == "on disk" else f"zip://{{1}}.png::{shutil.make_archive(top, 'zip', top)}"
        cells = [{"bytes": None, "path": name.format(top, i)} for i in range(40)]
    cells[6], cells[17] = None, {"bytes": b"no picture", "path": None}
    cells[29] = {"bytes": None, "path": str(tmp_path / "missing.png")}
    found = map_cells(lambda cell: np.asarray(open_image(cell)), cells)
    assert [i for i, result in enumerate(found) if isinstance(result, Unreadable)] == [6, 17, 29]
    assert all(np.array_equal(found[i], pictures[i]) for i in range(40) if i not in (6, 17, 29))


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_process_decodes_in_threads_of_its_own():
    """As those of accelerate's notebook_launcher, started after images were looked at."""
    picture = image(size=(200, 200))
    cells = [{"bytes": encoded(picture), "path": None}] * 8

    def decode():
        found = map_cells(lambda cell: np.asarray(open_image(cell)), cells)
        assert all(np.array_equal(pixels, picture) for pixels in found)

    decode()
    child = multiprocessing.get_context("fork").Process(target=decode)
    child.start()
    child.join(60)
    child.kill()
    assert child.exitcode == 0


def test_the_processes_of_a_machine_share_a_memory_mapped_file(tmp_path, cache, monkeypatch):
    few = folder(tmp_path / "few", image(), image(seed=1))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert load_images(few).memory_mapped and decoded(cache) == 1


# ---------------------------------------------------------------- examples/tiles.py


@pytest.fixture
def sort_tiles(repo):
    script = [sys.executable, repo / "examples" / "tiles.py"]
    return lambda clone, folder: subprocess.run([*script, clone, folder], capture_output=True, text=True)


def test_tiles_of_a_game_are_sorted_into_the_folders_of_classes(sort_tiles, tmp_path):
    release = tmp_path / "clone" / "releases" / "Nov-2015"
    places = ("dngn/altars", "dngn/floor", "dngn/gateways", "dngn/wall", "gui/spells", "mon", "mon/undead", "item/book")
    for place in (*places, "item/armour", "item/potion", "item/weapon"):
        (release / place).mkdir(parents=True)
        for name in ("a.png", "i-symbol.png", "notes.txt"):
            Image.new("P", (32, 32), 7).save(release / place / name, "png")
    assert sort_tiles(tmp_path / "clone", tmp_path / "tiles").returncode == 0
    found = {str(file.relative_to(tmp_path / "tiles")) for file in (tmp_path / "tiles").rglob("*.*")}
    names = {"altar", "armour", "book", "floor", "gateway", "monster", "potion", "spell", "wall", "weapon"}
    assert found == {f"{name}/a.png" for name in names} | {"monster/undead_a.png"}
    data = load_images(str(tmp_path / "tiles"), with_labels=True, channels=3)
    assert set(data.class_names) == names and data.shape == (3, 32, 32) and len(data) == 11


def test_another_repository_than_that_of_the_tiles_is_refused(sort_tiles, tmp_path):
    done = sort_tiles(tmp_path, tmp_path / "tiles")
    assert done.returncode == 1
    assert done.stderr == f"clone={str(tmp_path)!r} has no folder releases/Nov-2015/dngn/altars.\n"
