import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from lives import Lives
from runs import make_recipe

from ddpm_pipe.data.sources import open_dataset

# One worker per core: more threads would only wait for each other, here and in the processes that tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@contextmanager
def one_sentence(*parts: str, match: str = "") -> Iterator[None]:
    """What is done here raises a ValueError of one line, which ends with a full stop, has these parts, and matches."""
    with pytest.raises(ValueError) as error:
        yield
    told = str(error.value)
    assert told.endswith(".") and "\n" not in told, told
    for part in parts:
        assert part in told, told
    assert re.search(match, told), told


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the project."""
    return Path(__file__).parent.parent


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps the device and the precision of a process; each test starts as a new process would."""
    AcceleratorState._reset_state(reset_partial_state=True)  # what a test without this fixture left
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def recipe(tmp_path, fresh_accelerate):
    """A run of a few steps on the bundled test images at 8x8, in a folder of this test."""
    return lambda folder="run", *args, **options: make_recipe(tmp_path / folder, *args, **options)


@pytest.fixture(scope="session")
def few_images(tmp_path_factory, repo) -> str:
    """A folder of 60 of the bundled images, quickly read, as either split."""
    folder = tmp_path_factory.mktemp("data") / "few"
    few = open_dataset(str(repo / "examples" / "fashion_mnist"), "test").select(range(60))
    datasets.DatasetDict(train=few, test=few).save_to_disk(folder)
    return str(folder)


@pytest.fixture(scope="session")
def lives():
    """Starts runs in processes of their own."""
    handle = Lives()
    yield handle
    handle.close()


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]
"""Flags with which Chromium shows nothing and asks no other machine for anything by itself."""


@pytest.fixture(scope="module")
def browser():
    """Chromium, driven by Playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium, the browser of Debian's package of that name")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield opened
        opened.close()
