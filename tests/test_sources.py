"""Wherever images are, the same table of them; every place where there are none is one sentence."""

import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from broken_images import encoded
from conftest import one_sentence
from PIL import Image

from ddpm_pipe.data.memory import load_images
from ddpm_pipe.data.sources import list_images, open_dataset, read_labels
from ddpm_pipe.data.stream import stream_images


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.full((4, 4), number, dtype=np.uint8))


def make_folder(root: Path, *names: str) -> Path:
    """Files by name: grey images of their number, or text."""
    for number, name in enumerate(names):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(picture(number)) if file.suffix.lower() in (".png", ".jpg") else b"a,b\n1,2\n")
    return root


def parquet(path: Path, **columns) -> str:
    """Three images with other columns beside them, in a parquet file."""
    table = datasets.Dataset.from_dict({"image": [picture(n) for n in range(3)]} | columns)
    table.cast_column("image", datasets.Image()).to_parquet(path / "data.parquet")
    return str(path / "data.parquet")


def rows(dataset) -> list[dict]:
    undecoded = dataset.cast_column("image", datasets.Image(decode=False))
    return [row | {"image": row["image"]["path"]} for row in undecoded]


# ---------------------------------------------------------------- a folder of images

FOLDERS = {
    "names sorted by code point": ["b.png", "a.png", "A.png", "a-1.png", "é.png"],
    "classes": ["dog/1.png", "cat/1.png", "cat/0.png"],
    "names of folders sorted as parts of paths": ["a/1.png", "a-b/1.png", "a.b/1.png", "ab/1.png"],
    "images beside class folders": ["cat/1.png", "dog/1.png", "x.png"],
    "one folder": ["cat/1.png", "cat/2.png"],
    "classes further down": ["a/cat/1.png", "b/dog/1.png", "a/dog/2.png"],
    "several depths": ["a/cat/1.png", "dog/1.png"],
    "splits": ["train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "x.png"],
    "splits further down": ["data/train/a/1.png", "data/test/b/1.png", "data/train/b/1.png", "more/train/a/9.png"],
    "one split": ["train/1.png", "train/2.png", "x.png"],
    "several words for a split": ["train/1.png", "training/2.png", "train-1/3.png", "my_train/0.png", "val/1.png"],
    "classes and splits in one name": ["cat_train/1.png", "dog_train/1.png", "cat_test/3.png"],
    "a class called test": ["test/1.png", "dog/1.png"],
    "splits in the names of files": ["train_1.png", "training_1.png", "a_train.png", "z-train_1.png", "test1.png"],
    "hidden": [".a.png", ".h/1.png", "__x__/2.png", "b.png", "sub/.c/3.png", "__y.png"],
    "upper case": ["a.PNG", "b.Png", "c.png"],
    "text beside images": ["a.png", "b.png", "labels.txt", "README.md"],
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_listed_images_are_those_of_imagefolder_in_its_order_with_its_labels(tmp_path, kind):
    folder = make_folder(tmp_path / "images", *FOLDERS[kind])
    expected, listed = datasets.load_dataset(str(folder)), list_images(folder)
    assert list(listed) == list(expected)
    for split, dataset in expected.items():
        assert listed[split].features == dataset.features
        assert rows(listed[split]) == rows(dataset)


def test_the_name_of_one_file_does_not_leave_out_all_others(tmp_path):
    folder = make_folder(tmp_path / "images", "cat/1.png", "dog/training_ground.png", "dog/test_dummy.png", "dog/2.png")
    assert [len(split) for split in datasets.load_dataset(str(folder)).values()] == [1, 1]
    (split,) = list_images(folder).items()
    assert split[0] == "train" and split[1]["label"] == [0, 1, 1, 1]


def test_images_beside_the_folders_of_splits_are_left_out_with_a_warning(tmp_path):
    folder = make_folder(tmp_path / "images", "car/1.png", "plane/2.png", "train/3.png", "x.png")
    with pytest.warns(UserWarning, match="^images in car, plane are left out, because other folders name splits$"):
        listed = list_images(folder)
    assert [len(split) for split in listed.values()] == [1]


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_zip_file_is_read_as_the_folder_it_was_made_of(tmp_path, kind):
    folder = make_folder(tmp_path / "images", *FOLDERS[kind])
    expected = list_images(folder)
    archive = Path(shutil.make_archive(str(tmp_path / "zipped"), "zip", folder))
    listed = list_images(archive)
    assert list(listed) == list(expected)
    for split, dataset in expected.items():
        assert listed[split].features == dataset.features
        in_folder = [row | {"image": os.path.relpath(row["image"], folder)} for row in rows(dataset)]
        assert rows(listed[split]) == [row | {"image": f"zip://{row['image']}::{archive}"} for row in in_folder]


@pytest.mark.parametrize("load", [load_images, stream_images])
def test_a_zip_file_with_class_subfolders_has_labels(tmp_path, load):
    folder = make_folder(tmp_path / "images", "cat/1.png", "dog/1.png", "dog/2.png")
    data = load(shutil.make_archive(str(tmp_path / "zipped"), "zip", folder), with_labels=True)
    assert data.class_names == ("cat", "dog") and data.shape == (1, 4, 4)
    images, labels = data.take(torch.arange(3)) if load is load_images else data.decode(list(data.rows))
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2] and labels.tolist() == [0, 1, 1]


def test_metadata_in_a_zip_file_is_read(tmp_path):
    folder = make_folder(tmp_path / "images", "a.png", "b.png")
    (folder / "metadata.csv").write_text("file_name,kind\na.png,x\nb.png,y\n")
    file = shutil.make_archive(str(tmp_path / "zipped"), "zip", folder)
    assert load_images(file, with_labels=True, label_column="kind").class_names == ("x", "y")


@pytest.mark.parametrize(
    "names",
    [
        ["a.png", "metadata.csv"],
        ["a.png", "sub/b.parquet"],
        ["a.png", "more.zip"],
        ["train/test/1.png", "train/dog/1.png"],
        ["val_test_1.png", "test_2.png"],
        ["data/train-00000-of-00001.png", "data/x.png"],
        ["notes.txt"],
    ],
)
def test_folders_with_rules_of_their_own_are_left_to_datasets(tmp_path, names):
    assert list_images(make_folder(tmp_path, *names)) == {}


def test_a_described_folder_is_left_to_datasets(tmp_path):
    folder = make_folder(tmp_path / "images", "a.png", "b.png")
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: b.png\n---\n")
    assert [Path(row["image"]).name for row in rows(open_dataset(str(folder)))] == ["b.png"]


def test_metadata_beside_images_is_read(tmp_path):
    folder = make_folder(tmp_path / "images", "a.png", "b.png")
    (folder / "metadata.csv").write_text("file_name,kind\na.png,x\nb.png,y\n")
    assert open_dataset(str(folder))["kind"][:] == ["x", "y"]


@pytest.mark.parametrize("skipped", [0, 5])
def test_a_stream_of_listed_images_has_the_order_of_imagefolder(tmp_path, skipped):
    folder = make_folder(tmp_path / "images", *[f"{'ab'[i % 2]}/{i:02d}.png" for i in range(40)])

    def shuffled(stream) -> list[dict]:
        stream = stream.cast_column("image", datasets.Image(decode=False)).skip(skipped)
        return list(stream.shuffle(seed=1, buffer_size=10))

    expected = datasets.load_dataset(str(folder), split="train", streaming=True)
    assert shuffled(open_dataset(str(folder), streaming=True)) == shuffled(expected)


def test_links_are_followed_but_not_in_circles(tmp_path):
    folder = make_folder(tmp_path / "images", "a.png")
    outside = make_folder(tmp_path / "outside", "b.png")
    (folder / "circle").symlink_to(folder)
    (folder / "link").symlink_to(outside)
    (folder / "nowhere.png").symlink_to(tmp_path / "missing.png")
    (folder / "itself.png").symlink_to(folder / "itself.png")
    found = [os.path.relpath(row["image"], folder) for row in rows(open_dataset(str(folder)))]
    assert found == ["a.png", "link/b.png"]


def test_a_folder_may_have_wildcards_in_its_name(tmp_path):
    folder = make_folder(tmp_path / "dir [a]*b?", "x/1.png", "y/2.png")
    data = load_images(str(folder), with_labels=True)
    assert data.images[:, 0, 0, 0].tolist() == [0, 1] and data.labels.tolist() == [0, 1]
    assert len(load_images(parquet(folder / "x"))) == 3


# ---------------------------------------------------------------- splits


def make_table() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"image": [picture(n) for n in range(4)]}).cast_column("image", datasets.Image())


def _single(path: Path, form: str) -> str:
    """Four images in one place."""
    if form == "folder":
        return str(make_folder(path / "images", *[f"{n}.png" for n in range(4)]))
    if form == "saved":
        make_table().save_to_disk(path / "saved")
        return str(path / "saved")
    make_table().to_parquet(path / "train.parquet")
    return str(path / {"file": "train.parquet", "glob": "*.parquet"}[form])


@pytest.mark.parametrize("form", ["file", "glob", "saved", "folder"])
@pytest.mark.parametrize("load", [load_images, stream_images])
def test_what_is_in_one_place_has_one_split(tmp_path, form, load):
    data = _single(tmp_path, form)
    assert load(data).shape == (1, 4, 4)
    with pytest.raises(ValueError, match=r"with split='test' could not be read: .*split.*test.*\['train'\]") as error:
        load(data, "test")
    assert repr(data) in str(error.value)


@pytest.mark.parametrize("form", ["file", "saved", "folder"])
def test_a_part_of_a_split_is_taken(tmp_path, form):
    data = load_images(_single(tmp_path, form), "train[25%:75%]")
    assert data.images[:, 0, 0, 0].tolist() == [1, 2]


def test_a_part_without_rows_is_one_sentence(tmp_path):
    with one_sentence(match=r"split='train\[5:9\]' could not be read: it names no rows of train \(4 rows\)"):
        load_images(_single(tmp_path, "folder"), "train[5:9]")


def test_splits_of_a_saved_dataset_are_named_added_and_told_where_one_is_missing(tmp_path):
    table = make_table()
    saved = datasets.DatasetDict(train=table, test=table.select([3]))
    saved.save_to_disk(tmp_path / "data")
    data = str(tmp_path / "data")
    assert load_images(data, "test").images[:, 0, 0, 0].tolist() == [3]
    assert load_images(data, "test+train[:1]").images[:, 0, 0, 0].tolist() == [3, 0]
    with pytest.raises(ValueError, match=r"split='dev' could not be read: .*\['train', 'test'\]"):
        load_images(data, "dev")


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize("values", [[0.5, 1.5, 0.5], [0.0, float("nan"), 1.0]])
def test_floats_are_no_classes(tmp_path, values):
    with pytest.raises(ValueError, match="label_column='kind' holds float64, not classes"):
        load_images(parquet(tmp_path, kind=values), with_labels=True, label_column="kind")


@pytest.mark.parametrize(
    ("values", "feature"),
    [
        ([0, None, 1], datasets.Value("int64")),
        (["a", None, "b"], datasets.Value("string")),
        ([0, -1, 1], datasets.ClassLabel(names=["a", "b"])),
        ([0, None, 1], datasets.ClassLabel(names=["a", "b"])),
        ([0, 2, 1], datasets.ClassLabel(names=["a", "b"])),
    ],
)
def test_rows_without_the_label_of_a_class_are_told(values, feature):
    table = datasets.Dataset.from_dict({"kind": values}).cast_column("kind", datasets.Value(feature.dtype))
    table = datasets.Dataset(table.data, info=datasets.DatasetInfo(features=datasets.Features(kind=feature)))
    sentence = rf"label_column='kind' has no label of its 2 classes in 1 of 3 rows, .* row 1 \({values[1]}\)"
    with pytest.raises(ValueError, match=sentence):
        read_labels(table, "kind")


@pytest.mark.parametrize(
    ("values", "labels", "names"),
    [
        (["b", "a", "b"], [1, 0, 1], ("a", "b")),
        ([10, 2, 10], [0, 1, 0], ("10", "2")),  # as datasets numbers them: sorted as strings
        ([True, False, True], [1, 0, 1], ("False", "True")),
    ],
)
def test_labels_are_numbered_as_datasets_numbers_them(values, labels, names):
    table = datasets.Dataset.from_dict({"kind": values})
    found, found_names = read_labels(table, "kind")
    assert found.tolist() == labels and found_names == names
    encoded = table.class_encode_column("kind")
    assert encoded["kind"][:] == labels and tuple(encoded.features["kind"].names) == names


# ---------------------------------------------------------------- where there is nothing to read


def _cut(file: str | Path, share: float) -> str:
    os.truncate(file, int(os.path.getsize(file) * share))
    return str(file)


def _filled(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


def _zip(path):
    folder = make_folder(path / "images", *[f"{n}.png" for n in range(5)])
    return shutil.make_archive(str(path / "data"), "zip", folder)


def _tar(path):
    folder = make_folder(path / "images", *[f"{n}.png" for n in range(5)])
    with tarfile.open(path / "data.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, file.name)
    return path / "data.tar"


def _empty_zip(path):
    with zipfile.ZipFile(path / "data.zip", "w"):
        return str(path / "data.zip")


def _empty_parquet(path):
    pyarrow.parquet.write_table(pyarrow.table({"image": pyarrow.array([], pyarrow.binary())}), path / "data.parquet")
    return str(path / "data.parquet")


def _empty_shard(path):
    parquet(path)
    pyarrow.parquet.write_table(pyarrow.table({"image": pyarrow.array([], pyarrow.binary())}), path / "empty.parquet")
    return str(path)


def _cut_shard(path):
    for name in ("0.tar", "1.tar"):
        shutil.copy(_tar(path), path / name)
    (path / "data.tar").unlink()
    shutil.rmtree(path / "images")
    _cut(path / "1.tar", 0.1)  # 1024 of its 10240 bytes: the first of its files
    return str(path)


def _nulls(path):
    cells = pyarrow.array([None, {"bytes": None, "path": None}], pyarrow.struct({"bytes": "binary", "path": "string"}))
    pyarrow.parquet.write_table(pyarrow.table({"image": cells}), path / "data.parquet")
    return str(path / "data.parquet")


def _saved_without_its_table(path):
    make_table().save_to_disk(path / "saved")
    for file in (path / "saved").glob("*.arrow"):
        file.unlink()
    return str(path / "saved")


def _run_folder(path):
    folder = make_folder(path / "run", "samples/1.png", "config.yaml")
    (folder / "checkpoints").mkdir()
    return str(folder)


def _wildcards_around_parquet(path):
    (path / "dir [a]*").mkdir()
    parquet(path / "dir [a]*")
    return str(path / "dir [a]*")


def _latin_1(path):
    (path / "images").mkdir()
    file = os.fsencode(path / "images") + b"/\xe9.png"
    with open(file, "wb") as handle:
        handle.write(encoded(picture(0)))
    return str(path / "images")


def _bad_metadata(path):
    folder = make_folder(path / "images", "a.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.p')
    return str(folder)


@pytest.mark.parametrize(
    ("arrange", "sentence"),
    [
        (lambda path: _cut(_zip(path), 0.5), "data.zip.*could not be read: BadZipFile: File is not a zip file"),
        (lambda path: _cut(_zip(path), 0), "data.zip.*could not be read: BadZipFile"),
        (_empty_zip, "data.zip.*could not be read"),
        (lambda path: _cut(_tar(path), 0.12), "data.tar is truncated"),
        (lambda path: _cut(_tar(path), 0), "data.tar is truncated"),
        (lambda path: str(_filled(path / "data.tar", b"x" * 5000 + bytes(1024))), "data.tar.*not be read: ReadError"),
        (lambda path: _cut(parquet(path), 0.5), "data.parquet.*could not be read: .*[Pp]arquet"),
        (lambda path: _cut(parquet(path), 0), "data.parquet.*could not be read: .*0 bytes"),
        (_empty_parquet, "data.parquet has no rows"),
        (_empty_shard, "empty.parquet has no rows; remove it"),
        (_cut_shard, "1.tar is truncated or compressed"),
        (_nulls, "could not be read: it has no image that can be read in 2 rows; the first is .*there is no image"),
        (_saved_without_its_table, "saved.*could not be read: .*No such file"),
        (_run_folder, "run' is the folder of a training run; give a folder of images"),
        (_wildcards_around_parquet, r"dir \[a\]\*' is no folder of plain images.*rename it"),
        (_latin_1, "xe9.png' is not UTF-8; rename it|udce9.png' is not UTF-8; rename it"),
        (_bad_metadata, "images.*could not be read: .*JSON"),
        (lambda path: str(make_folder(path, "a.png") / "a.png"), r"a.png' is a file of an unknown kind.*\.parquet"),
        (lambda path: str(path / "*.tar"), "neither a file nor a folder here"),
        (lambda path: "", "data='' names nothing"),
        (lambda path: "~nobody-of-that-name/images", "could not be read: .*home directory"),
    ],
)
@pytest.mark.parametrize("load", [load_images, stream_images])
def test_what_cannot_be_opened_is_one_sentence(tmp_path, arrange, sentence, load):
    data = arrange(tmp_path)
    with pytest.raises(ValueError, match=sentence) as error:
        load(data)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("load", [load_images, stream_images])
@pytest.mark.parametrize(("column", "kind"), [("number", "int64"), ("share", "float64"), ("pictures", "List")])
def test_a_column_of_other_values_holds_no_images(tmp_path, load, column, kind):
    data = parquet(tmp_path, number=[1, 2, 3], share=[0.1, 0.2, 0.3], pictures=[["a"], ["b"], ["c"]])
    with pytest.raises(ValueError, match=f"image_column='{column}' holds {kind}, not images"):
        load(data, image_column=column)


@pytest.mark.parametrize("load", [load_images, stream_images])
def test_a_column_of_paths_holds_images(tmp_path, load):
    files = sorted(str(file) for file in make_folder(tmp_path / "images", "0.png", "1.png", "2.png").iterdir())
    assert load(parquet(tmp_path, file=files), image_column="file").shape == (1, 4, 4)
