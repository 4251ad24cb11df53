"""Pushing a Space: what it holds, whom it is for, and that it draws with the model of the Hub."""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from conftest import one_sentence
from hub_server import HubServer
from huggingface_hub import HfApi, SpaceCard, constants
from PIL import Image
from test_demo import save

from ddpm_pipe import DDIMScheduler, DDPMPipeline
from ddpm_pipe.config import parse
from ddpm_pipe.sharing.config import PushConfig
from ddpm_pipe.sharing.push import push as share

pytestmark = pytest.mark.xdist_group("space")
pytest.importorskip("gradio", reason="a Space gets the gradio of this machine")

SPACE = "spaces/org/page"


@pytest.fixture
def hub():
    with HubServer(tokens={"hf_good": "org"}) as server:
        yield server


@pytest.fixture
def push(hub, monkeypatch):
    """`ddpm-pipe push` in this process."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    return lambda *argv: share(parse(PushConfig, argv))


@contextmanager
def running(hub: HubServer, folder: Path) -> Iterator[str]:
    """Run the app.py of a Space in a process of its own, and yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | hub.environment(home=folder / "home", token="hf_good")
    environment |= {"GRADIO_SERVER_PORT": str(port)}
    process = subprocess.Popen([sys.executable, "app.py"], cwd=folder, env=environment)
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 300
    try:
        while True:
            assert process.poll() is None and time.monotonic() < deadline, "the Space does not answer"
            with suppress(OSError):
                urllib.request.urlopen(address)
                break
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait()


PAGE = ("--space", "org/page", "--repo", "org/model")


def test_a_page_is_private_and_holds_what_it_needs(hub, push, capsys):
    push(*PAGE)
    assert f"pushed to {hub.url}/spaces/org/page" in capsys.readouterr().out and hub.is_private(SPACE)
    files = {name: content.decode() for name, content in hub.files(SPACE).items()}
    assert {"README.md", "app.py", "requirements.txt", "ddpm_pipe/demo/app.py", "ddpm_pipe/LICENSE"} < set(files)
    assert not [name for name in files if "__pycache__" in name or name.startswith("tests")]
    card = SpaceCard(files["README.md"]).data
    assert (card.sdk, card.app_file, card.models) == ("gradio", "app.py", ["org/model"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", card.sdk_version) and card.python_version == "3.12"
    assert "torch>=2.6" in files["requirements.txt"].splitlines() and "extra" not in files["requirements.txt"]
    assert "Copyright" in files["ddpm_pipe/LICENSE"] and "model='org/model'" in files["app.py"]
    assert not [name for name, text in files.items() if str(Path.home()) + "/" in text]


def test_a_dry_run_lists_the_files_and_pushes_nothing(hub, push, capsys):
    push(*PAGE, "--dry_run")
    listed = {line.split()[1] for line in capsys.readouterr().out.splitlines()}
    assert {"README.md", "app.py", "requirements.txt", "ddpm_pipe/cli.py", "ddpm_pipe/presets/cifar10.yaml"} < listed
    assert not hub.requests


def test_pushing_again_makes_no_commit_and_deletes_modules_that_are_gone(hub, push):
    push(*PAGE)
    before = hub.commits(SPACE)
    push(*PAGE)
    assert hub.commits(SPACE) == before
    api = HfApi(endpoint=hub.url, token="hf_good")
    for name in ("ddpm_pipe/old.py", "picture.md"):
        api.upload_file(path_or_fileobj=b"old", path_in_repo=name, repo_id="org/page", repo_type="space")
    push(*PAGE)
    assert "ddpm_pipe/old.py" not in hub.files(SPACE) and "picture.md" in hub.files(SPACE)


def test_a_public_space_is_pushed_to_only_when_told(hub, push):
    push(*PAGE, "--public")
    assert not hub.is_private(SPACE)
    with pytest.raises(ValueError, match="is public already; pass --public"):
        push(*PAGE)


def test_a_page_needs_the_id_of_a_model(push):
    with one_sentence("repo='../model' is not the id of a repository"):
        push("--space", "org/page", "--repo", "../model")


def make_folder(folder: Path, sdk: str = "static") -> Path:
    (folder / "assets").mkdir(parents=True)
    (folder / "README.md").write_text(f"---\ntitle: Page\nsdk: {sdk}\n---\n# Page\n")
    (folder / "index.html").write_text("<p>drawn here</p>")
    (folder / "assets" / "model.onnx").write_bytes(b"\0weights")
    (folder / ".env").write_text("secret")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("secret")
    return folder


def test_a_folder_that_is_a_space_is_pushed_as_it_is(hub, push, tmp_path):
    push("--space", "org/page", "--folder", str(make_folder(tmp_path / "web")))
    pushed = hub.files(SPACE)
    assert set(pushed) == {".gitattributes", "README.md", "index.html", "assets/model.onnx"}
    assert pushed["assets/model.onnx"] == b"\0weights" and hub.is_private(SPACE) and hub.repos[SPACE].sdk == "static"


@pytest.mark.parametrize("sdk", ["streamlit", "''"])
def test_a_folder_that_names_no_sdk_is_refused(hub, push, tmp_path, sdk):
    with one_sentence("README.md must say sdk: gradio, docker, static"):
        push("--space", "org/page", "--folder", str(make_folder(tmp_path / "web", sdk)))
    assert not hub.requests


def test_a_folder_without_a_card_or_with_a_link_is_refused(push, tmp_path):
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "README.md").write_text("---\nsdk: [static\n---\n")
    for place in (tmp_path, tmp_path / "torn"):
        with one_sentence("is no Space", "README.md"):
            push("--space", "org/page", "--folder", str(place))
    folder = make_folder(tmp_path / "web")
    (folder / "private").symlink_to(tmp_path)
    with one_sentence("private is a link, and links are not pushed"):
        push("--space", "org/page", "--folder", str(folder))


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ([], "run must be given"),
        (["--repo", "org/model"], "run must be given"),
        (["--space", "org/page"], "repo must be given"),
        (["--run", "runs/mine"], "repo must be given"),
        (["--run", "runs/mine", "--repo", "org/model", "--folder", "web"], "folder='web' needs space"),
    ],
)
def test_what_is_missing_is_named(push, argv, told):
    with one_sentence(told):
        push(*argv)


@pytest.mark.slow
def test_a_pushed_space_draws_with_the_model_of_the_hub(hub, push, tmp_path):
    """Its files, and not this checkout, run in a process of their own; gradio's client asks it for images."""
    from gradio_client import Client

    pipeline = DDPMPipeline.from_pretrained(save(tmp_path / "model", num_class_embeds=3))
    pipeline.push_to_hub("org/model", token="hf_good")
    card = hub.files("org/model")["README.md"].decode().replace("---\n", "---\nclass_names: [cat, dog, bird]\n", 1)
    api = HfApi(endpoint=hub.url, token="hf_good")
    api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id="org/model")
    push(*PAGE)
    for name, content in hub.files(SPACE).items():
        (tmp_path / "space" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "space" / name).write_bytes(content)
    page = tmp_path / "space" / "ddpm_pipe" / "demo" / "page.py"
    page.write_text(page.read_text().replace("A pixel-space diffusion model", "The copy in the Space"))
    with running(hub, tmp_path / "space") as address:
        client = Client(address, verbose=False, download_files=tmp_path)
        assert "The copy in the Space: 8×8 pixels, colour, 3 classes" in str(client.config)
        (images, *_) = client.predict(0, "ddim", 4, "balanced", 1.5, 3, api_name="/draw")
    shown = images["value"]
    assert [each["caption"] for each in shown] == ["0 · cat", "1 · dog", "2 · bird"]
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    seeds = [torch.Generator().manual_seed(seed) for seed in range(3)]
    expected = pipeline(3, seeds, num_inference_steps=4, class_labels=[0, 1, 2], guidance_scale=1.5).images
    drawn = [Image.open(each["image"]) for each in shown]
    assert [each.tobytes() for each in drawn] == [each.tobytes() for each in expected]
