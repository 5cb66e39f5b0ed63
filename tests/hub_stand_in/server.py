"""The Hub's HTTP interface, as far as reading goes, on a port of this machine: behind unmodified client libraries.

It answers what `huggingface_hub`, `datasets` and `transformers` ask when they read: a repository's revision, its tree,
single paths, files (small ones from the Hub's own host, large ones from another host by a redirect, both with ranges),
and the discussions and commits of the automatic conversion to safetensors. It redirects names that have moved, asks
for a token or an access request where a repository is gated, and can be told to answer too late, too little or not at
all. Every request is kept.
"""

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

LARGE_BYTES = 10_000  # what is larger lies in Git LFS; the real limit is 10 MB
BINARY = (".bin", ".safetensors", ".parquet", ".h5", ".msgpack", ".ot")  # these lie there whatever their size


@dataclass
class Repository:
    """A repository: what each commit holds, and where its branches, tags and pull requests stand."""

    kind: str  # "model" or "dataset"
    name: str  # OWNER/NAME
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by commit, oldest first: the files by path
    refs: dict[str, str] = field(default_factory=dict)  # main, tags, refs/pr/1
    pull_requests: list[dict[str, Any]] = field(default_factory=list)
    gated: bool = False

    def commit(self, files: Mapping[str, bytes], ref: str = "main") -> str:
        """Add a commit that holds `files` and nothing else; `ref` moves there."""
        digest = hashlib.sha1(repr((self.name, len(self.commits), sorted(files))).encode())
        for path in sorted(files):
            digest.update(files[path])
        oid = digest.hexdigest()
        self.commits[oid] = dict(files)
        self.refs[ref] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, tag, pull request, or the start of a commit's name stands for."""
        if revision in self.refs:
            return self.refs[revision]
        return next((oid for oid in self.commits if len(revision) >= 5 and oid.startswith(revision)), None)


@dataclass(frozen=True)
class Request:
    """A request that was answered."""

    method: str
    host: str
    path: str
    status: int
    sent: int  # bytes of the body that went out
    token: str | None  # what the Authorization header held
    range: str | None


class HubStandIn(ThreadingHTTPServer):
    """The server; it listens until `shutdown`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        port = self.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        self.content_url = f"http://localhost:{port}"  # another host, as the real Hub's is
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.moved: dict[tuple[str, str], str] = {}
        self.accepted: set[str] = set()  # tokens whose owners may read what is gated
        self.blobs: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.refuse_next: list[tuple[int, dict[str, str]]] = []  # status and headers of the next answers
        self.cut_next: dict[str, int] = {}  # by path in the repository: bytes after which the connection is closed
        self.ignores_ranges = False
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def add(self, repository: Repository, *old_names: str) -> Repository:
        """Serve a repository, also by the names that it once had."""
        self.repositories[repository.kind, repository.name] = repository
        self.moved.update({(repository.kind, old): repository.name for old in old_names})
        return repository

    def find(self, kind: str, name: str) -> Repository | None:
        """The repository of this present name."""
        return self.repositories.get((kind, name))

    def downloads(self) -> Counter[str]:
        """How often the content of each file was sent as a whole or in part, by path in its repository."""
        pattern = re.compile(r"/api/resolve-cache/\w+/.+/[0-9a-f]{40}/(.+)|/content/[0-9a-f]{64}/(.+)")
        found = (pattern.fullmatch(r.path) for r in self.requests if r.method == "GET" and r.status in (200, 206))
        return Counter(match[1] or match[2] for match in found if match)

    def forget(self) -> None:
        """Begin a new count."""
        self.requests.clear()


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubStandIn

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    # The answer, in the order in which the Hub decides: host, limits, names, permissions, content.

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        path = unquote(url.path)
        if path.startswith("/content/"):
            self._content(*path.removeprefix("/content/").split("/", 1))
        elif path == "/":
            self._say(200, b"")
        elif self.server.refuse_next and path != "/api/agent-harnesses":  # which a client asks for once, if at all
            status, headers = self.server.refuse_next.pop(0)
            self._say(status, b"", headers)
        elif match := re.fullmatch(r"/api/resolve-cache/(model|dataset)s/(.+)/([0-9a-f]{40})/(.+)", path):
            self._with_repository(match[1], match[2], lambda repository: self._file(repository, match[3], match[4]))
        elif path.startswith(("/api/models/", "/api/datasets/")):
            self._api(path, {**parse_qs(url.query), **parse_qs(body.decode())})
        elif match := re.fullmatch(r"/(datasets/)?(.+?)/resolve/(refs/(?:pr|convert)/[^/]+|[^/]+)/(.+)", path):
            kind = "dataset" if match[1] else "model"
            self._with_repository(kind, match[2], lambda repository: self._resolve(repository, match[3], match[4]))
        else:
            self._refuse(404, "Not found")

    def _api(self, path: str, form: dict[str, list[str]]) -> None:
        _, _, kinds, *words = path.split("/")
        kind = kinds.removesuffix("s")
        verbs = ("revision", "tree", "paths-info", "commits", "discussions")
        verb_at = next((place for place, word in enumerate(words) if word in verbs), len(words))
        name, verb, rest = "/".join(words[:verb_at]), "".join(words[verb_at : verb_at + 1]), words[verb_at + 1 :]
        if rest[:1] == ["refs"]:  # refs/pr/1: a name with slashes, which clients quote
            rest = ["/".join(rest[:3]), *rest[3:]]

        def answer(repository: Repository) -> None:
            if verb == "discussions":
                found = repository.pull_requests
                self._say_json({"discussions": found, "count": len(found), "start": 0})
                return
            commit = repository.resolve(rest[0] if rest else "main")
            if commit is None:
                self._refuse(404, f"Invalid rev id: {rest[0]}", "RevisionNotFound")
                return
            files = repository.commits[commit]
            if verb in ("", "revision"):
                self._say_json(_information(repository, commit))
            elif verb == "commits":
                oids = list(repository.commits)
                history = [*reversed(oids[: oids.index(commit) + 1])]
                self._say_json(
                    [{"id": oid, "title": "", "message": "", "date": _DATE, "authors": []} for oid in history]
                )
            elif verb == "paths-info":
                self._say_json([e for p in form.get("paths", []) for e in _entries(files, p)])
            elif (
                found := _listing(files, "/".join(rest[1:]), form.get("recursive", [""])[0].lower() == "true")
            ) or not rest[1:]:
                self._say_json(found)
            else:
                self._refuse(404, f"{'/'.join(rest[1:])} does not exist", "EntryNotFound")

        self._with_repository(kind, name, answer)

    def _with_repository(self, kind: str, name: str, answer: Any) -> None:
        repository = self.server.find(kind, name)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if new := self.server.moved.get((kind, name)):
            self._say(307, b"", {"Location": self.path.replace(quote(name), new, 1)})
        elif repository is None:
            # the Hub does not tell a stranger whether a name is free or private
            self._refuse(*((404, "Repository not found") if token else (401, "Invalid username or password.")),
                         "RepoNotFound")  # fmt: skip
        elif repository.gated and token not in self.server.accepted and "/resolve" in self.path:
            reason = f"Access to {kind} {name} is restricted. You must have access to it and be authenticated."
            self._refuse(403 if token else 401, reason, "GatedRepo")
        else:
            answer(repository)

    def _resolve(self, repository: Repository, revision: str, path: str) -> None:
        commit = repository.resolve(revision)
        if commit is None:
            self._refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return
        content = repository.commits[commit].get(path)
        if content is None:
            self._refuse(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit})
            return
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if is_large(path, content):
            sha = hashlib.sha256(content).hexdigest()
            self.server.blobs[sha] = content
            headers |= {
                "X-Linked-Size": str(len(content)),
                "X-Linked-ETag": f'"{sha}"',
                "Location": f"{self.server.content_url}/content/{sha}/{quote(path)}",
            }
            self._say(302, b"", headers)
        else:
            kinds, name = repository.kind + "s", repository.name
            headers["Location"] = f"/api/resolve-cache/{kinds}/{name}/{commit}/{quote(path)}"
            self._say(307, b"", headers)

    def _file(self, repository: Repository, commit: str, path: str) -> None:
        content = repository.commits[commit][path]
        self._send(path, content, {"X-Repo-Commit": commit, "ETag": f'"{git_oid(content)}"'})

    def _content(self, sha: str, path: str) -> None:
        self._send(path, self.server.blobs[sha], {"ETag": f'"{sha}"'})

    def _send(self, path: str, content: bytes, headers: dict[str, str]) -> None:
        wanted, status = self.headers.get("Range"), 200
        if wanted and not self.server.ignores_ranges:
            first = int(wanted.removeprefix("bytes=").rstrip("-"))
            headers |= {"Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"}
            content, status = content[first:], 206
        cut = self.server.cut_next.pop(path, None) if self.command == "GET" else None
        self._say(status, content, headers | {"Accept-Ranges": "bytes"}, cut)

    def _say_json(self, answer: Any) -> None:
        self._say(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, message: str, code: str = "", more: dict[str, str] | None = None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message, **(more or {})}
        self._say(status, json.dumps({"error": message}).encode(), headers)

    def _say(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        sent = body[:cut] if self.command != "HEAD" else b""
        token = self.headers.get("Authorization")
        host = str(self.headers.get("Host")).split(":")[0]
        with self.server.lock:
            self.server.requests.append(
                Request(self.command, host, unquote(urlsplit(self.path).path), status, len(sent), token,
                        self.headers.get("Range"))
            )  # fmt: skip
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(sent)
        if cut is not None:
            self.close_connection = True


_DATE = "2024-01-01T00:00:00.000Z"


def is_large(path: str, content: bytes) -> bool:
    """Whether a file lies in Git LFS."""
    return path.endswith(BINARY) or len(content) > LARGE_BYTES


def git_oid(content: bytes) -> str:
    """The name that Git gives a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _information(repository: Repository, commit: str) -> dict[str, Any]:
    siblings = [{"rfilename": path} for path in sorted(repository.commits[commit])]
    gated: Any = "auto" if repository.gated else False
    return {"id": repository.name, "sha": commit, "siblings": siblings, "private": False, "gated": gated, "tags": [],
            "disabled": False, "lastModified": _DATE, "createdAt": _DATE, "downloads": 0, "likes": 0}  # fmt: skip


def _file_entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
    if is_large(path, content):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


def _entries(files: Mapping[str, bytes], path: str) -> list[dict[str, Any]]:
    """What `paths-info` says of one path: a file, a folder or nothing."""
    if path in files:
        return [_file_entry(path, files[path])]
    is_folder = any(name.startswith(f"{path}/") for name in files)
    return [{"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()}] if is_folder else []


def _listing(files: Mapping[str, bytes], folder: str, recursive: bool) -> list[dict[str, Any]]:
    """The files and folders in `folder`, or all below it."""
    prefix = f"{folder}/" if folder else ""
    below = [path for path in sorted(files) if path.startswith(prefix)]
    depth = prefix.count("/")
    folders = {"/".join(path.split("/")[:end]) for path in below for end in range(depth + 1, path.count("/") + 1)}
    found = [entry for name in sorted({*folders, *below}) for entry in _entries(files, name)]
    return [entry for entry in found if recursive or entry["path"].count("/") == depth]
