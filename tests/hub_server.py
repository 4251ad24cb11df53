"""A Hugging Face Hub on the loopback, for tests: the HTTP API of the real one, its repositories in memory.

The unmodified client works with it from other processes, started under `HubServer.environment()`. A Space is the
repository "spaces/org/name". Not there: data sets, pull requests, tags, gated repositories, multipart uploads and Xet.
"""

import base64
import hashlib
import json
import re
import socket
import sys
import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import Message
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

LFS_KINDS = ["bin", "ckpt", "h5", "npy", "npz", "pkl", "png", "pt", "pth", "safetensors", "zip"]
LFS_SIZE = 10 * 1024**2
SPACES = "spaces/"
GITATTRIBUTES = "".join(f"*.{kind} filter=lfs diff=lfs merge=lfs -text\n" for kind in LFS_KINDS).encode()

# ---------------------------------------------------------------- repositories


@dataclass(frozen=True)
class Blob:
    """The content of a file, in git or in the large file storage."""

    data: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def git_oid(self) -> str:
        """What git calls the blob: for a large file, the blob of its pointer."""
        content = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def pointer(self) -> bytes:
        facts = "version https://git-lfs.github.com/spec/v1", f"oid sha256:{self.sha256}", f"size {len(self.data)}"
        return "\n".join((*facts, "")).encode()

    def large(self, hash_name: str) -> dict | None:
        """The facts of a large file; two parts of the API name its hash differently."""
        sizes = {"size": len(self.data), "pointerSize": len(self.pointer)}
        return {hash_name: self.sha256, **sizes} if self.lfs else None

    @property
    def etag(self) -> str:
        """What the client compares its files with, before uploads as in its cache."""
        return self.sha256 if self.lfs else self.git_oid


class Commit(NamedTuple):
    sha: str
    parent: "Commit | None"
    title: str
    date: str
    files: dict[str, Blob]

    def history(self) -> list["Commit"]:
        """This commit and those before it."""
        commits = [self]
        while commits[-1].parent:
            commits.append(commits[-1].parent)
        return commits

    def last_change(self, path: str) -> dict:
        """The commit that gave a file its present content."""
        commit = self
        while commit.parent and commit.parent.files.get(path) == self.files[path]:
            commit = commit.parent
        return {"id": commit.sha, "title": commit.title, "date": commit.date}

    def entries(self, expand: bool = False) -> dict[str, dict]:
        """Every file and every folder, as the API lists them."""
        listed: dict[str, dict] = {}
        for path, blob in sorted(self.files.items()):
            for folder in reversed(Path(path).parents[:-1]):
                oid = hashlib.sha1(str(folder).encode()).hexdigest()
                listed[str(folder)] = {"type": "directory", "oid": oid, "size": 0, "path": str(folder)}
            listed[path] = {"type": "file", "oid": blob.git_oid, "size": len(blob.data), "path": path}
            listed[path]["lfs"] = blob.large("oid")
            listed[path]["lastCommit"] = self.last_change(path) if expand else None
        return listed


class Repo:
    """A repository: branches that point to commits, and the large files it was sent."""

    def __init__(self, name: str, private: bool, sdk: str | None = None):
        self.name, self.private, self.sdk = name, private, sdk
        self.lfs: dict[str, Blob] = {}
        self.known: dict[str, Commit] = {}
        self.branches: dict[str, Commit] = {}
        self.add("main", "initial commit", {".gitattributes": Blob(GITATTRIBUTES)})

    def add(self, branch: str, title: str, files: dict[str, Blob]) -> Commit:
        """A commit on top of a branch."""
        parent, date = self.branches.get(branch), f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"
        facts = [parent and parent.sha, title, date, {path: blob.git_oid for path, blob in files.items()}]
        sha = hashlib.sha1(json.dumps(facts).encode()).hexdigest()
        self.known[sha] = self.branches[branch] = Commit(sha, parent, title, date, files)
        return self.branches[branch]

    def at(self, revision: str) -> Commit:
        """The commit of a branch, or that of a full sha."""
        commit = self.branches.get(revision) or self.known.get(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit


# ---------------------------------------------------------------- requests and answers


class Refusal(Exception):
    """An answer that the client turns into an exception, by its status and its code."""

    def __init__(self, status: int, message: str, code: str | None = None):
        self.status, self.message, self.code = status, message, code


class Call(NamedTuple):
    """A request as the functions of the Hub see it."""

    method: str
    query: dict[str, list[str]]
    headers: Message
    body: bytes
    account: str | None = None
    writes: bool = False

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in ("true", "1")

    def json(self) -> Any:
        return json.loads(self.body)


class Answer(NamedTuple):
    body: Any = b""
    status: int = 200
    headers: Mapping[str, str] = {}


def front_matter(card: str) -> Any:
    """The metadata of a model card."""
    match = re.match(r"---\s*\n(.*?)\n?---\s*(\n|$)", card, re.DOTALL)
    return yaml.safe_load(match[1]) if match else None


def send_content(call: Call, blob: Blob, headers: Mapping[str, str]) -> Answer:
    """A file, or the range of it that was asked for."""
    size = len(blob.data)
    headers = {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes", **headers}
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("Range") or "")
    if not match or match[0] == "bytes=-":
        return Answer(blob.data, 200, headers)
    first = int(match[1]) if match[1] else max(size - int(match[2]), 0)
    last = min(int(match[2]), size - 1) if match[1] and match[2] else size - 1
    if first > last:
        return Answer(b"", 416, {"Content-Range": f"bytes */{size}"})
    return Answer(blob.data[first : last + 1], 206, {**headers, "Content-Range": f"bytes {first}-{last}/{size}"})


# ---------------------------------------------------------------- the Hub


class Hub:
    """What the Hub keeps, and what it answers."""

    def __init__(self, tokens: Mapping[str, str], read_only: Collection[str] = ()):
        self.tokens, self.read_only = dict(tokens), set(read_only)
        self.repos: dict[str, Repo] = {}
        self.lock = threading.RLock()
        self.url = self.cdn = ""

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """The content of every file of a repository."""
        return {path: blob.data for path, blob in self.repos[name].at(revision).files.items()}

    def commits(self, name: str, revision: str = "main") -> list[str]:
        """The shas of a branch, the newest first; the oldest is the one that creating the repository makes."""
        return [commit.sha for commit in self.repos[name].at(revision).history()]

    def is_private(self, name: str) -> bool:
        return self.repos[name].private

    def answer(self, path: str, call: Call) -> Answer:
        """What the first route that fits has to say."""
        method = "GET" if call.method == "HEAD" else call.method
        try:
            for route_method, pattern, function in ROUTES:
                if route_method == method and (match := re.fullmatch(pattern, path)):
                    names = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                    return function(self, self.identify(call), **names)
            raise Refusal(404, f"Not there in this Hub: {method} {path}")
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            return Answer({"error": refusal.message}, refusal.status, headers)

    def identify(self, call: Call) -> Call:
        """The call with the account of its token; a wrong token is refused even where none is needed."""
        token = (call.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return call._replace(account=self.tokens.get(token), writes=token not in self.read_only)

    def find(self, call: Call, name: str, write: bool = False) -> Repo:
        """A repository; one that the account may not see looks as if it were not there."""
        repo = self.repos.get(name)
        mine = call.account == name.removeprefix(SPACES).split("/")[0]
        if not call.account and (write or not repo or repo.private):
            # At https the client takes every 401 of a repository for this; at http it needs the code.
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        if not repo or (repo.private and not mine):
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if write and not (mine and call.writes):
            raise Refusal(403, "Forbidden: you must use a write token of this namespace to upload to a repository.")
        return repo

    def whoami(self, call: Call) -> Answer:
        if not call.account:
            raise Refusal(401, "Invalid username or password.")
        access = {"displayName": "test", "role": "write" if call.writes else "read"}
        auth = {"type": "access_token", "accessToken": access}
        return Answer({"type": "user", "name": call.account, "fullname": call.account, "orgs": [], "auth": auth})

    def create_repo(self, call: Call) -> Answer:
        wanted = call.json()
        if not call.account:
            raise Refusal(401, "Invalid username or password.")
        namespace = wanted.get("organization") or call.account
        if namespace != call.account or not call.writes:
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        name = f"{namespace}/{wanted['name']}"
        if wanted.get("type") == "space":
            if wanted.get("sdk") not in ("gradio", "docker", "static"):
                raise Refusal(400, "Invalid sdk of a Space")
            name = SPACES + name
        facts = {"url": f"{self.url}/{name}", "name": name}
        if name in self.repos:
            return Answer({"error": "You already created this model repo", **facts}, 409)
        # Older clients send the first, newer ones the second.
        self.repos[name] = Repo(
            name, bool(wanted.get("private")) or wanted.get("visibility") == "private", wanted.get("sdk")
        )
        return Answer(facts)

    def validate_yaml(self, call: Call) -> Answer:
        """Whether the head of a model card is YAML; the real Hub also looks at what it says."""
        try:
            missing = not dict(front_matter(call.json()["content"]) or {})
        except (yaml.YAMLError, TypeError, ValueError) as error:
            return Answer({"errors": [{"message": f"not a mapping in YAML: {error}"}]}, 400)
        return Answer({"warnings": [{"message": "empty or missing yaml metadata in repo card"}] * missing})

    def model_info(self, call: Call, name: str, revision: str = "main") -> Answer:
        repo = self.find(call, name)
        commit = repo.at(revision)
        card = front_matter(commit.files.get("README.md", Blob(b"")).data.decode()) or {}
        siblings = []
        for path, blob in sorted(commit.files.items()):
            facts = {"size": len(blob.data), "blobId": blob.git_oid, "lfs": blob.large("sha256")}
            siblings.append({"rfilename": path, **(facts if "blobs" in call.query else {})})
        info: dict[str, Any] = {"id": name, "modelId": name, "author": name.split("/")[0]}
        info |= {"sha": commit.sha, "siblings": siblings}
        info |= {"private": repo.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
        info |= {"createdAt": commit.history()[-1].date, "lastModified": commit.date, "cardData": card}
        info |= {} if repo.sdk is None else {"sdk": repo.sdk}
        info |= {key: card[key] for key in ("library_name", "pipeline_tag", "tags") if key in card}
        return Answer(info)

    def tree(self, call: Call, name: str, revision: str, folder: str = "") -> Answer:
        prefix = folder and folder + "/"
        listed = self.find(call, name).at(revision).entries(call.flag("expand"))
        below = [entry for path, entry in listed.items() if path.startswith(prefix)]
        if folder and not below:
            raise Refusal(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        return Answer([e for e in below if call.flag("recursive") or "/" not in e["path"].removeprefix(prefix)])

    def paths_info(self, call: Call, name: str, revision: str) -> Answer:
        form = call._replace(query=parse_qs(call.body.decode()))
        listed = self.find(call, name).at(revision).entries(form.flag("expand"))
        return Answer([listed[path] for path in form.query.get("paths", []) if path in listed])

    def refs(self, call: Call, name: str) -> Answer:
        heads = self.find(call, name).branches.items()
        branches = [{"name": key, "ref": f"refs/heads/{key}", "targetCommit": head.sha} for key, head in heads]
        return Answer({"branches": branches, "converts": [], "tags": []})

    def create_branch(self, call: Call, name: str, branch: str) -> Answer:
        repo = self.find(call, name, write=True)
        if branch in repo.branches:
            raise Refusal(409, "Reference already exists")
        repo.branches[branch] = repo.at(call.json().get("startingPoint", "main"))
        return Answer({})

    def preupload(self, call: Call, name: str, revision: str) -> Answer:
        """How each file is to be uploaded, and what is at its place now, so that the client can leave it out."""
        present = self.find(call, name, write=True).at(revision).files
        answers = []
        for file in call.json()["files"]:
            path = file["path"]
            large = path.rsplit(".", 1)[-1] in LFS_KINDS or file["size"] > LFS_SIZE
            binary = b"\0" in base64.b64decode(file["sample"])
            answers.append({"path": path, "uploadMode": "lfs" if large or binary else "regular", "shouldIgnore": False})
            if path in present:
                answers[-1]["oid"] = present[path].etag
        return Answer({"files": answers})

    def lfs_batch(self, call: Call, name: str) -> Answer:
        """Where to send large files; those that are there already need no action."""
        repo, objects = self.find(call, name, write=True), []
        for wanted in call.json()["objects"]:
            objects.append({"oid": wanted["oid"], "size": wanted["size"]})
            if wanted["oid"] not in repo.lfs:
                upload = {"href": f"{self.cdn}/lfs/{name}/{wanted['oid']}"}
                verify = {"href": f"{self.url}/{name}.git/info/lfs/objects/verify"}
                objects[-1]["actions"] = {"upload": upload, "verify": verify}
        return Answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, call: Call, name: str, oid: str) -> Answer:
        blob = Blob(call.body, lfs=True)
        if blob.sha256 != oid:
            raise Refusal(400, "The content does not have the hash it was announced with")
        self.repos[name].lfs[oid] = blob
        return Answer()

    def lfs_verify(self, call: Call, name: str) -> Answer:
        blob = self.find(call, name, write=True).lfs.get(call.json()["oid"])
        if not blob or len(blob.data) != call.json()["size"]:
            raise Refusal(404, "The large file was not uploaded")
        return Answer({})

    def lfs_get(self, call: Call, name: str, oid: str) -> Answer:
        """A large file, as a CDN sends it: to whoever has its address."""
        return send_content(call, self.repos[name].lfs[oid], {})

    def commit(self, call: Call, name: str, revision: str) -> Answer:
        repo = self.find(call, name, write=True)
        if revision not in repo.branches:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        head = repo.branches[revision]
        files, header = dict(head.files), {}
        for item in map(json.loads, call.body.splitlines()):
            key, value = item["key"], item["value"]
            path = value.get("path", "")
            if key == "header":
                header = value
            elif key == "file":
                files[path] = Blob(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in repo.lfs:
                    raise Refusal(400, "Your push was rejected: an LFS pointer pointed to a file that does not exist.")
                files[path] = repo.lfs[value["oid"]]
            elif key == "deletedFolder":
                files = {file: blob for file, blob in files.items() if not file.startswith(path.rstrip("/") + "/")}
            elif files.pop(path, None) is None:  # deletedFile
                raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
        if not head.sha.startswith(header.get("parentCommit") or ""):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        made = head if files == head.files else repo.add(revision, header["summary"], files)
        return Answer({"success": True, "commitOid": made.sha, "commitUrl": f"{self.url}/{name}/commit/{made.sha}"})

    def resolve(self, call: Call, name: str, revision: str, path: str) -> Answer:
        """A file of git, or the way to a large one."""
        commit = self.find(call, name).at(revision)
        headers = {"X-Repo-Commit": commit.sha}
        blob = commit.files.get(path)
        if blob is None:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return Answer({"error": "Entry not found"}, 404, headers)
        if not blob.lfs:
            return send_content(call, blob, headers)
        headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.data))}
        # The name of the file is there for the log, as the real address has it too.
        return Answer(b"", 302, {**headers, "Location": f"{self.cdn}/lfs/{name}/{blob.sha256}?filename={quote(path)}"})


NAME, REVISION, OID = rf"(?P<name>(?:{SPACES})?[^/]+/[^/]+)", r"(?P<revision>[^/]+)", r"(?P<oid>[0-9a-f]{64})"
MODEL = rf"/api/(?:models/)?{NAME}"
ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("GET", "/api/whoami-v2", Hub.whoami),
    ("POST", "/api/repos/create", Hub.create_repo),
    ("POST", "/api/validate-yaml", Hub.validate_yaml),
    ("GET", MODEL, Hub.model_info),
    ("GET", rf"{MODEL}/revision/{REVISION}", Hub.model_info),
    ("GET", rf"{MODEL}/tree/{REVISION}(/(?P<folder>.+))?", Hub.tree),
    ("POST", rf"{MODEL}/paths-info/{REVISION}", Hub.paths_info),
    ("GET", rf"{MODEL}/refs", Hub.refs),
    ("POST", rf"{MODEL}/branch/(?P<branch>[^/]+)", Hub.create_branch),
    ("POST", rf"{MODEL}/preupload/{REVISION}", Hub.preupload),
    ("POST", rf"{MODEL}/commit/{REVISION}", Hub.commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Hub.lfs_batch),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/verify", Hub.lfs_verify),
    ("PUT", rf"/lfs/{NAME}/{OID}", Hub.lfs_put),
    ("GET", rf"/lfs/{NAME}/{OID}", Hub.lfs_get),
    ("GET", rf"/{NAME}/resolve/{REVISION}/(?P<path>.+)", Hub.resolve),
]

# ---------------------------------------------------------------- the network


@dataclass
class Request:
    """A line of the log: what was asked, and how many bytes of a body were received and sent."""

    method: str
    path: str  # with the query, decoded
    agent: str
    range: str | None
    status: int = 0  # still 0: cut before an answer
    received: int = 0
    sent: int = 0


@dataclass
class Drop:
    after_bytes: int
    times: int
    path_contains: str


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "Listener"

    def serve(self) -> None:
        """Reads a request, has the Hub answer it, and cuts the connection where a test wants that."""
        hub, agent = self.server.hub, self.headers.get("User-Agent", "")
        request = Request(self.command, unquote(self.path), agent, self.headers.get("Range"))
        hub.requests.append(request)
        size = int(self.headers.get("Content-Length") or 0)
        limit = hub.limit(request, size) if size else None
        body = self.rfile.read(size if limit is None else limit)
        request.received = len(body)
        if len(body) < size:
            self.close_connection = True
            return
        address = urlsplit(self.path)
        with hub.lock:
            call = Call(self.command, parse_qs(address.query), self.headers, body)
            answer = hub.answer(address.path, call)
        content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        limit = hub.limit(request, len(content)) if self.command == "GET" else None
        sent = b"" if self.command == "HEAD" else content[:limit]
        # Before anything is sent: a test may look at the log as soon as its client has the answer.
        request.status, request.sent = answer.status, len(sent)
        self.send_response(answer.status)
        kind = "application/octet-stream" if isinstance(answer.body, bytes) else "application/json"
        for key, value in {"Content-Type": kind, **answer.headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(sent)
        self.close_connection |= limit is not None

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the log is `HubServer.requests`."""


class Listener(ThreadingHTTPServer):
    """A port of the Hub: taken at once, answering once it is started."""

    daemon_threads = True

    def __init__(self, hub: "HubServer", port: int = 0):
        super().__init__(("127.0.0.1", port), Handler, bind_and_activate=False)
        self.hub, self.connections, self.started = hub, set[Any](), False
        self.server_bind()

    def start(self) -> None:
        self.server_activate()
        self.started = True
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        if self.started:
            self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that went away is no error of the Hub
            super().handle_error(request, client_address)


class HubServer(Hub):
    """The Hub on two ports of the loopback, one of them its CDN, and the ways in which a network fails.

    `tokens` gives the account, which is also the one namespace it may write to, of each token.
    """

    def __init__(self, tokens: Mapping[str, str], read_only: Collection[str] = ()):
        super().__init__(tokens, read_only)
        self.requests: list[Request] = []
        self.drops: list[Drop] = []
        # Two origins, as in reality: the client reads the facts of a file off a redirect only if it leads elsewhere.
        self.listeners = [Listener(self), Listener(self)]
        self.url, self.cdn = (f"http://127.0.0.1:{listener.server_port}" for listener in self.listeners)

    def __enter__(self) -> "HubServer":
        self.up()
        return self

    def __exit__(self, *error: object) -> None:
        for listener in self.listeners:
            listener.stop()

    def up(self) -> None:
        for listener in self.listeners:
            listener.start()

    def down(self) -> None:
        """Cuts what is open and refuses connections, until `up`; the ports stay taken."""
        for listener in self.listeners:
            listener.stop()
        self.listeners = [Listener(self, listener.server_port) for listener in self.listeners]

    def drop(self, after_bytes: int = 0, times: int = 1, path_contains: str = "") -> None:
        """Cuts the next `times` bodies longer than `after_bytes` there: that of a GET's answer, else the request's."""
        self.drops.append(Drop(after_bytes, times, path_contains))

    def limit(self, request: Request, size: int) -> int | None:
        """After how many bytes a body is to be cut, if at all."""
        with self.lock:
            for drop in self.drops:
                if drop.times > 0 and drop.path_contains in request.path and size > drop.after_bytes:
                    drop.times -= 1
                    return drop.after_bytes
        return None

    def environment(self, *, home: Path | str, token: str | None = None) -> dict[str, str]:
        """What a process needs on top of its environment to take this for the Hub, with a cache of its own."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": f"{home}/hub",
            "HF_TOKEN_PATH": f"{home}/token",
            "HF_TOKEN": token or "",
            "HUGGING_FACE_HUB_TOKEN": "",
            "HF_HUB_DISABLE_XET": "1",  # large files go the way of git-lfs
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DOWNLOAD_TIMEOUT": "5",
            "HF_HUB_ETAG_TIMEOUT": "5",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
