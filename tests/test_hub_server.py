"""The Hub of the tests: the real client, unmodified, does with it what it does with the real one."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import HfApi, constants, get_session, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

NAME = "org/model"
MB = 1024**2


@pytest.fixture(autouse=True)
def client_settings(monkeypatch):
    """What the environment of the Hub sets in other processes, for the client in this one."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def no_waits(monkeypatch):
    """The client tries again at once, where it would wait for up to half a minute."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)


@pytest.fixture
def hub():
    with HubServer({"hf_good": "org", "hf_read": "org", "hf_other": "other"}, read_only=["hf_read"]) as hub:
        yield hub


@pytest.fixture
def api(hub) -> HfApi:
    return HfApi(endpoint=hub.url, token="hf_good")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A pipeline in small: text in git, weights and a picture in the large file storage."""
    root = tmp_path / "folder"
    (root / "unet").mkdir(parents=True)
    (root / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    (root / "README.md").write_text("---\nlicense: mit\ntags: [ddpm]\n---\n# A model\n")
    (root / "unet" / "config.json").write_text("{}")
    (root / "unet" / "model.safetensors").write_bytes(random.Random(0).randbytes(MB))
    (root / "grid.png").write_bytes(b"\x89PNG\r\n\x1a\n\0")
    return root


def contents(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def uploaded(hub: HubServer, revision: str = "main") -> dict[str, bytes]:
    """What was sent to the repository: all of it but what the Hub puts there itself."""
    files = hub.files(NAME, revision)
    assert files.pop(".gitattributes")
    return files


def push(api: HfApi, folder: Path, **options) -> str:
    return api.upload_folder(repo_id=NAME, folder_path=folder, **options).oid


def asked(hub: HubServer, method: str, path_contains: str = "") -> list[str]:
    return [request.path for request in hub.requests if request.method == method and path_contains in request.path]


# ---------------------------------------------------------------- repositories and uploads


@pytest.mark.parametrize("private", [False, True])
def test_a_repository_is_created_once(hub, api, private):
    assert api.create_repo(NAME, private=private).repo_id == NAME
    assert hub.is_private(NAME) == private
    assert api.model_info(NAME).private == private
    assert api.create_repo(NAME, private=not private, exist_ok=True).repo_id == NAME
    with pytest.raises(HfHubHTTPError, match="already created") as error:
        api.create_repo(NAME)
    assert error.value.response.status_code == 409
    assert hub.is_private(NAME) == private
    assert len(hub.commits(NAME)) == 1
    assert api.whoami()["name"] == "org"


def test_a_folder_is_uploaded_regular_files_in_git_and_large_ones_by_lfs(hub, api, folder):
    api.create_repo(NAME)
    sha = push(api, folder)
    assert uploaded(hub) == contents(folder)
    assert hub.commits(NAME)[0] == sha == api.model_info(NAME).sha
    assert len(asked(hub, "PUT", "/lfs/")) == 2
    files = {file.path: file for file in api.list_repo_tree(NAME, recursive=True, expand=True)}
    assert {path for path, file in files.items() if getattr(file, "lfs", None)} == {
        "grid.png",
        "unet/model.safetensors",
    }
    assert files["unet/model.safetensors"].lfs.size == MB
    assert files["README.md"].last_commit.oid == sha
    assert "unet" in files
    assert {entry.path for entry in api.list_repo_tree(NAME, "unet")} == {"unet/config.json", "unet/model.safetensors"}
    assert "unet/config.json" not in {entry.path for entry in api.list_repo_tree(NAME)}
    assert [entry.path for entry in api.get_paths_info(NAME, ["README.md", "nothing", "unet"])] == ["README.md", "unet"]
    info = api.model_info(NAME, files_metadata=True)
    assert info.card_data.license == "mit" and info.tags == ["ddpm"]
    assert {file.rfilename: file.size for file in info.siblings}["unet/model.safetensors"] == MB


def test_a_second_identical_upload_sends_nothing_and_makes_no_commit(hub, api, folder):
    api.create_repo(NAME)
    sha = push(api, folder)
    hub.requests.clear()
    assert push(api, folder) == sha
    assert len(hub.commits(NAME)) == 2
    assert not asked(hub, "PUT") and not asked(hub, "POST", "/commit/")


def test_a_changed_file_makes_a_commit_and_is_all_that_is_sent(hub, api, folder):
    api.create_repo(NAME)
    first = push(api, folder)
    before = contents(folder)
    (folder / "unet" / "config.json").write_text('{"changed": true}')
    second = push(api, folder)
    assert uploaded(hub) == contents(folder) and uploaded(hub, first) == before
    (folder / "unet" / "model.safetensors").write_bytes(b"weights")
    hub.requests.clear()
    third = push(api, folder)
    assert hub.commits(NAME)[:3] == [third, second, first]
    assert len(asked(hub, "PUT")) == 1


def test_files_are_deleted_and_a_commit_on_an_old_parent_is_refused(hub, api, folder):
    api.create_repo(NAME)
    first = push(api, folder)
    api.delete_file("grid.png", NAME)
    api.delete_folder("unet", NAME)
    assert set(uploaded(hub)) == {"README.md", "model_index.json"}
    with pytest.raises(EntryNotFoundError):
        api.delete_file("grid.png", NAME)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        push(api, folder, parent_commit=first)
    assert len(hub.commits(NAME)) == 4
    hub.requests.clear()
    push(api, folder, delete_patterns="*")
    assert uploaded(hub) == contents(folder)
    assert not asked(hub, "PUT"), "large files stay when they are deleted from a branch"


def test_a_commit_that_changes_nothing_is_none(hub, api):
    api.create_repo(NAME)
    line = {"key": "file", "value": {"path": "a", "content": "YQ==", "encoding": "base64"}}
    body = "\n".join(map(json.dumps, [{"key": "header", "value": {"summary": "a"}}, line]))
    headers = {"Authorization": "Bearer hf_good"}
    url = f"{hub.url}/api/models/{NAME}/commit/main"
    answers = [get_session().post(url, content=body, headers=headers).json() for _ in range(2)]
    assert answers[0]["commitOid"] == answers[1]["commitOid"] == hub.commits(NAME)[0]
    assert len(hub.commits(NAME)) == 2


# ---------------------------------------------------------------- downloads


def test_files_are_downloaded_once(hub, api, folder, tmp_path):
    api.create_repo(NAME)
    sha = push(api, folder)
    options = {"endpoint": hub.url, "token": False, "cache_dir": tmp_path / "cache"}
    for file in "unet/model.safetensors", "README.md":
        assert Path(hf_hub_download(NAME, file, **options)).read_bytes() == contents(folder)[file]
    hub.requests.clear()
    root = snapshot_download(NAME, allow_patterns=["*.json", "unet/*"], **options)
    assert Path(root).name == sha
    found = contents(Path(root))
    assert found == {path: contents(folder)[path] for path in found}
    assert set(found) == {"README.md", "model_index.json", "unet/config.json", "unet/model.safetensors"}
    fetched = asked(hub, "GET", "/resolve/") + asked(hub, "GET", "/lfs/")
    assert sorted(path.rsplit("/")[-1] for path in fetched) == ["config.json", "model_index.json"]
    hub.requests.clear()
    assert snapshot_download(NAME, allow_patterns=["*.json", "unet/*"], revision=sha, **options) == root
    assert not hub.requests, "all of a commit is in the cache"


def test_the_log_names_a_large_file_by_its_place_in_the_repository(hub, api, folder, tmp_path):
    api.create_repo(NAME)
    push(api, folder)
    hub.requests.clear()
    snapshot_download(NAME, endpoint=hub.url, cache_dir=tmp_path / "cache", user_agent="ddpm_pipe/1", token=False)
    fetched = next(request for request in hub.requests if "filename=unet/model.safetensors" in request.path)
    assert (fetched.method, fetched.status, fetched.sent) == ("GET", 200, MB)
    assert "ddpm_pipe/1" in fetched.agent


def test_a_branch_and_a_commit_are_revisions(hub, api, folder, tmp_path):
    api.create_repo(NAME)
    first = push(api, folder)
    api.create_branch(NAME, branch="step/100")
    api.create_branch(NAME, branch="step/100", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="already exists"):
        api.create_branch(NAME, branch="step/100")
    (folder / "README.md").write_text("# On a branch\n")
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        second = push(api, folder, revision="step/100")
    assert {ref.name: ref.target_commit for ref in api.list_repo_refs(NAME).branches} == {
        "main": first,
        "step/100": second,
    }
    assert hub.commits(NAME)[0] == first and hub.commits(NAME, "step/100")[:2] == [second, first]
    for revision, text in {"main": "# A model", first: "# A model", "step/100": "On a", second: "On a"}.items():
        cache = tmp_path / revision.replace("/", "-")
        path = hf_hub_download(NAME, "README.md", revision=revision, endpoint=hub.url, cache_dir=cache, token=False)
        assert text in Path(path).read_text()
        assert (
            text
            in (
                Path(snapshot_download(NAME, revision=revision, endpoint=hub.url, cache_dir=cache)) / "README.md"
            ).read_text()
        )
    assert api.revision_exists(NAME, first) and not api.revision_exists(NAME, "0" * 40)


def test_what_is_missing_is_named(hub, api, tmp_path):
    options = {"endpoint": hub.url, "cache_dir": tmp_path / "cache", "token": "hf_good"}
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download(NAME, "config.json", **options)
    with pytest.raises(RepositoryNotFoundError):
        snapshot_download(NAME, **options)
    api.create_repo(NAME)
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(NAME, "config.json", **options)
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(NAME, "config.json", revision="nowhere", **options)
    with pytest.raises(RevisionNotFoundError):
        snapshot_download(NAME, revision="nowhere", **options)
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(NAME, "nowhere"))
    assert api.file_exists(NAME, ".gitattributes") and not api.file_exists(NAME, "config.json")


# ---------------------------------------------------------------- tokens


def test_a_private_repository_is_not_there_for_others(hub, api, folder, tmp_path):
    api.create_repo(NAME, private=True)
    push(api, folder)
    options = {"endpoint": hub.url, "cache_dir": tmp_path / "cache"}
    for token, status in {False: 401, "hf_other": 404}.items():
        with pytest.raises(RepositoryNotFoundError) as error:
            hf_hub_download(NAME, "README.md", token=token, **options)
        assert error.value.response.status_code == status
        with pytest.raises(RepositoryNotFoundError):
            snapshot_download(NAME, token=token, **options)
        with pytest.raises(RepositoryNotFoundError):
            push(HfApi(endpoint=hub.url, token=token), folder)
    for token in "hf_good", "hf_read":
        hf_hub_download(NAME, "unet/model.safetensors", token=token, force_download=True, **options)


def test_a_wrong_token_is_refused_everywhere(hub, api, folder, tmp_path):
    api.create_repo(NAME)
    wrong = HfApi(endpoint=hub.url, token="hf_wrong")
    calls = [
        wrong.whoami,
        lambda: wrong.create_repo("org/another"),
        lambda: wrong.create_repo(NAME, exist_ok=True),
        lambda: wrong.model_info(NAME),
        lambda: push(wrong, folder),
        lambda: hf_hub_download(NAME, "a", endpoint=hub.url, token="hf_wrong", cache_dir=tmp_path / "cache"),
        lambda: snapshot_download(NAME, endpoint=hub.url, token="hf_wrong", cache_dir=tmp_path / "cache"),
    ]
    for call in calls:
        with pytest.raises(HfHubHTTPError) as error:
            call()
        assert error.value.response.status_code == 401
        assert not isinstance(error.value, RepositoryNotFoundError)


def test_a_token_without_the_right_to_write_may_read(hub, api, folder):
    api.create_repo(NAME)
    for token in "hf_read", "hf_other":
        other = HfApi(endpoint=hub.url, token=token)
        assert other.model_info(NAME).sha == hub.commits(NAME)[0]
        with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
            push(other, folder)
        with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
            other.create_repo("org/another")
    with pytest.raises(RepositoryNotFoundError):
        push(HfApi(endpoint=hub.url, token=False), folder)
    assert len(hub.commits(NAME)) == 1 and list(hub.repos) == [NAME]


# ---------------------------------------------------------------- failures


@pytest.mark.usefixtures("no_waits")
def test_a_dropped_download_goes_on_from_where_it_was(hub, api, tmp_path):
    content = random.Random(1).randbytes(25 * MB)
    api.create_repo(NAME)
    api.upload_file(path_or_fileobj=content, path_in_repo="a.bin", repo_id=NAME)
    hub.requests.clear()
    hub.drop(after_bytes=11 * MB, path_contains="a.bin")
    path = hf_hub_download(NAME, "a.bin", endpoint=hub.url, cache_dir=tmp_path / "cache", token=False)
    assert Path(path).read_bytes() == content
    gets = [request for request in hub.requests if request.method == "GET"]
    # The client keeps what it has in pieces of 10 MB.
    assert [(get.range, get.status, get.sent) for get in gets] == [
        (None, 200, 11 * MB),
        (f"bytes={10 * MB}-", 206, 15 * MB),
    ]


@pytest.mark.usefixtures("no_waits")
def test_a_download_that_is_always_dropped_fails(hub, api, folder, tmp_path):
    api.create_repo(NAME)
    push(api, folder)
    options = {"endpoint": hub.url, "cache_dir": tmp_path / "cache", "token": False}
    hub.drop(after_bytes=1000, times=100, path_contains="model.safetensors")
    with pytest.raises(Exception, match="without sending complete message body"):
        hf_hub_download(NAME, "unet/model.safetensors", **options)
    hub.drops.clear()
    path = hf_hub_download(NAME, "unet/model.safetensors", **options)
    assert Path(path).read_bytes() == contents(folder)["unet/model.safetensors"]


@pytest.mark.usefixtures("no_waits")
def test_a_dropped_upload_leaves_the_repository_as_it_was(hub, api, folder):
    api.create_repo(NAME)
    before = hub.commits(NAME)
    hub.drop(after_bytes=100_000, times=100, path_contains="/lfs/")
    with pytest.raises(RuntimeError, match=r"Error while uploading 'unet/model\.safetensors'"):
        push(api, folder)
    assert hub.commits(NAME) == before and uploaded(hub) == {}
    assert {request.received for request in hub.requests if request.method == "PUT" and not request.status} == {100_000}
    hub.drops.clear()
    hub.drop(path_contains="/commit/")
    with pytest.raises(Exception, match=r"(?i)disconnected|reset|broken pipe"):
        push(api, folder)
    assert hub.commits(NAME) == before and uploaded(hub) == {}
    hub.requests.clear()
    push(api, folder)
    assert uploaded(hub) == contents(folder) and len(hub.commits(NAME)) == 2
    assert not asked(hub, "PUT"), "the large files were there already"


@pytest.mark.usefixtures("no_waits")
def test_an_upload_dropped_once_is_sent_again_by_the_client(hub, api, folder):
    api.create_repo(NAME)
    hub.drop(after_bytes=100_000, path_contains="/lfs/")
    push(api, folder)
    assert uploaded(hub) == contents(folder)


@pytest.mark.usefixtures("no_waits")
def test_a_network_that_is_down_and_up_again(hub, api, folder, tmp_path):
    api.create_repo(NAME)
    sha = push(api, folder)
    options = {"endpoint": hub.url, "cache_dir": tmp_path / "cache", "token": False}
    root = snapshot_download(NAME, **options)
    hub.down()
    assert snapshot_download(NAME, **options) == root, "from the cache"
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(NAME, "another.json", **options)
    with pytest.raises(Exception, match="refused"):
        push(api, folder)
    hub.up()
    assert push(api, folder) == sha


def test_a_hub_that_is_down_can_be_left():
    with HubServer({}) as hub:
        hub.down()


# ---------------------------------------------------------------- other processes


def run(hub: HubServer, home: Path, code: str, *args: object, token: str = "hf_good") -> str:
    """What a program prints that takes the server for the Hub, by nothing but its environment."""
    environment = {**os.environ, **hub.environment(home=home, token=token)}
    command = [sys.executable, "-c", code, *map(str, args)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


PUSH = """
import sys
from huggingface_hub import ModelCard, create_repo, upload_folder
create_repo("org/model", private=True)
print(upload_folder(repo_id="org/model", folder_path=sys.argv[1]).oid)
card = ModelCard.load("org/model")
card.data.library_name = "diffusers"
card.validate()
card.push_to_hub("org/model", commit_message="Card")
"""

LOAD = """
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
try:
    print(snapshot_download("org/model"), ModelCard.load("org/model").data.library_name)
except RepositoryNotFoundError:
    print("not found")
"""


def test_the_environment_is_all_that_other_processes_need(hub, folder, tmp_path):
    sha = run(hub, tmp_path / "home", PUSH, folder)
    assert hub.is_private(NAME) and hub.commits(NAME)[1] == sha
    assert len(asked(hub, "PUT", "/lfs/")) == 2
    root, library = run(hub, tmp_path / "home", LOAD).split()
    assert library == "diffusers"
    assert Path(root).is_relative_to(tmp_path / "home") and Path(root).name == hub.commits(NAME)[0]
    assert contents(Path(root)) == hub.files(NAME)
    assert run(hub, tmp_path / "another", LOAD, token="") == "not found"


def test_a_card_that_is_not_yaml_is_refused_before_anything_is_sent(hub, api, folder):
    api.create_repo(NAME)
    (folder / "README.md").write_text("---\ntags: [ddpm\n---\n")
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
        push(api, folder)
    assert uploaded(hub) == {}
