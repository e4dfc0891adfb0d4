"""A hub of models on this machine: enough of the protocol of huggingface.co for `huggingface_hub`, timm and transformers.

    with Hub(folder) as hub:
        hub.use_here(monkeypatch, home, token="hf_owner")  # in this process
        subprocess.run([...], env=os.environ | hub.environment(home, token="hf_owner"))  # in another one

Repository ORG/NAME is the folder `hub.root / ORG / NAME`: put files there, or push them. Another branch or tag REV is the
folder `ORG/NAME@REV`. A commit hash is computed from the files, so a repository that changes has a new one.
"""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants, hf_api

LARGE = (".safetensors", ".bin", ".onnx", ".pth", ".pt", ".pt2")  # in Git LFS, as huggingface.co keeps them


class Hub(ThreadingHTTPServer):
    """The server, in a thread of its own between `with` and the end of its block."""

    daemon_threads = True

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.tokens: dict[str, set[str]] = {"hf_owner": {"org"}, "hf_reader": set()}  # and the names they may write to
        self.gated: dict[str, set[str]] = {}  # repository: tokens whose owners were granted access
        self.private: set[str] = set()  # repositories that only known tokens see
        self.cuts: list[int] = []  # the next downloads break off after so many bytes each
        self.broken: int | None = None  # every answer has this status
        self.full = False  # no large file is taken
        self.requests: list[str] = []  # "GET /org/name/resolve/main/config.json bytes=100-"
        self.uploads: dict[str, bytes] = {}  # large files by SHA-256

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Variables for a process that uses this hub, with its cache and token in `home` and not in the user's own."""
        paths = {"HF_HOME": f"{home}", "HF_HUB_CACHE": f"{home / 'hub'}", "HF_TOKEN_PATH": f"{home / 'token'}"}
        # Xet is another protocol, of other servers; without it the client uses Git LFS.
        switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}
        return paths | switches | {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": token or ""}

    def use_here(self, patch: pytest.MonkeyPatch, home: Path, token: str | None = None) -> None:
        """The same in this process, where the client has read its variables already."""
        variables = self.environment(home, token)
        for name, value in variables.items():
            patch.setenv(name, value)
            if hasattr(constants, name):
                patch.setattr(constants, name, value == "1" if value in ("0", "1") else value)
        patch.setattr(constants, "ENDPOINT", self.endpoint)
        patch.setattr(hf_api.api, "endpoint", self.endpoint)
        template = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    def find_folder(self, repo: str, revision: str) -> Path | None:
        """The folder of a revision: "main", a branch, a tag or a commit hash."""
        main = self.root / repo
        folders = {f.name.partition("@")[2]: f for f in [main, *main.parent.glob(f"{main.name}@*")] if f.is_dir()}
        by_hash = {hash_commit(folder): folder for folder in folders.values()} if len(revision) == 40 else {}
        return folders.get("" if revision == "main" else revision) or by_hash.get(revision)


def list_files(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def hash_commit(folder: Path) -> str:
    each = (f"{name} {hashlib.sha1(content).hexdigest()}\n" for name, content in list_files(folder).items())
    return hashlib.sha1("".join(each).encode()).hexdigest()


def hash_file(path: str, content: bytes) -> str:
    """As ETags and `oid`s are: SHA-256 of large files, Git's SHA-1 of others."""
    if path.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Refused(Exception):
    """An answer with an error: status, the hub's code of it, and its sentence."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None: ...

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:  # a client that went away
            self.close_connection = True

    def do_GET(self) -> None:
        self.commit: dict[str, str] = {}
        self.server.requests.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
        body, sent = self.rfile.read(int(self.headers.get("Content-Length", 0))), self.headers.get("Authorization")
        self.token = sent.removeprefix("Bearer ") if sent else None
        try:
            if self.server.broken:
                raise Refused(self.server.broken, "", "The hub is broken.")
            if self.token is not None and self.token not in self.server.tokens:
                raise Refused(401, "", "Invalid credentials in Authorization header")
            self.route([unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")], body)
        except Refused as refused:
            status, code, message = refused.args
            found = {"X-Error-Code": code, "X-Error-Message": message}
            self.answer({"error": message}, status, {k: v for k, v in found.items() if v} | self.commit)

    do_HEAD = do_PUT = do_POST = do_GET

    def route(self, parts: list[str], body: bytes) -> None:
        if parts[:2] == ["api", "datasets"]:  # which lie in the folder "datasets"
            parts = ["api", "models", f"datasets/{parts[2]}", *parts[3:]]
        elif parts[0] == "datasets":
            parts = [f"datasets/{parts[1]}", *parts[2:]]
        if ".." in parts:
            raise Refused(404, "EntryNotFound", "Entry not found")
        match self.command, parts:
            case "GET", ["api", "whoami-v2"]:
                if self.token is None:
                    raise Refused(401, "", "Invalid username or password.")
                self.answer({"name": "someone", "type": "user", "auth": {"accessToken": {"role": "write"}}, "orgs": []})
            case "POST", ["api", "validate-yaml"]:
                self.answer({"errors": [], "warnings": []})
            case "POST", ["api", "repos", "create"]:
                asked = json.loads(body)
                repo = f"{asked['organization'] or 'someone'}/{asked['name']}"
                self.check_writer(repo)
                exists = (self.server.root / repo).exists()
                (self.server.root / repo).mkdir(parents=True, exist_ok=True)
                if not exists and asked.get("visibility") == "private":
                    self.server.private.add(repo)
                self.answer({"url": f"{self.server.endpoint}/{repo}", "name": repo}, 409 if exists else 200)
            case "GET", ["api", "models", org, name, *rest] if not rest or rest[0] == "revision":
                folder = self.open_repo(f"{org}/{name}", rest[1] if rest else "main")
                about = {
                    "id": f"{org}/{name}",
                    "sha": hash_commit(folder),
                    "private": f"{org}/{name}" in self.server.private,
                }
                self.answer(about | {"tags": [], "siblings": [{"rfilename": path} for path in list_files(folder)]})
            case "GET", ["api", "models", org, name, "tree", revision, *under]:
                self.answer(self.list_tree(self.open_repo(f"{org}/{name}", revision), under))
            case "POST", ["api", "models", org, name, "preupload", revision]:
                self.check_writer(f"{org}/{name}")
                have = list_files(self.open_repo(f"{org}/{name}", revision))
                paths = [file["path"] for file in json.loads(body)["files"]]
                modes = [{"path": p, "uploadMode": "lfs" if p.endswith(LARGE) else "regular"} for p in paths]
                oids = [{"oid": hash_file(p, have[p]) if p in have else None, "shouldIgnore": False} for p in paths]
                self.answer({"files": [mode | oid for mode, oid in zip(modes, oids, strict=True)]})
            case "POST", [org, name, "info", "lfs", "objects", "batch"]:
                self.check_writer(f"{org}/{name.removesuffix('.git')}")
                asked, where = json.loads(body)["objects"], f"{self.server.endpoint}/uploads/"
                for file in asked:
                    if file["oid"] not in self.server.uploads:
                        file["actions"] = {"upload": {"href": where + file["oid"]}}
                self.answer({"transfer": "basic", "objects": asked})
            case "PUT", ["uploads", _] if self.server.full:
                raise Refused(507, "", "The storage is full")
            case "PUT", ["uploads", oid] if hash_file(LARGE[0], body) == oid:
                self.server.uploads[oid] = body
                self.answer({})
            case "POST", ["api", "models", org, name, "commit", revision]:
                self.check_writer(f"{org}/{name}")
                folder = self.open_repo(f"{org}/{name}", revision)
                self.write_commit(folder, [json.loads(line) for line in body.splitlines()])
                url = f"{self.server.endpoint}/{org}/{name}/commit/{hash_commit(folder)}"
                self.answer({"success": True, "commitOid": hash_commit(folder), "commitUrl": url})
            case "GET" | "HEAD", [org, name, "resolve" | "cdn" as how, revision, *path] if path:
                self.send_file(f"{org}/{name}", revision, "/".join(path), how)
            case _:
                raise Refused(404, "", f"No such page: {self.command} {self.path}")

    def check_writer(self, repo: str) -> None:
        if self.token is None:
            raise Refused(401, "", "Invalid username or password.")
        if repo.split("/")[0] not in self.server.tokens[self.token]:
            raise Refused(
                403, "", f'You don\'t have the rights to create a model under the namespace "{repo.split("/")[0]}"'
            )

    def open_repo(self, repo: str, revision: str) -> Path:
        if not (self.server.root / repo).is_dir() or (repo in self.server.private and self.token is None):
            # To those who are not logged in, it does not say whether there is one.
            raise Refused(401 if self.token is None else 404, "RepoNotFound", "Repository not found")
        if (folder := self.server.find_folder(repo, revision)) is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return folder

    def list_tree(self, folder: Path, under: list[str]) -> list[dict[str, Any]]:
        files = {p: c for p, c in list_files(folder).items() if p.split("/")[: len(under)] == under}
        if under and not files:
            raise Refused(404, "EntryNotFound", f"{'/'.join(under)} does not exist")
        large = {p: {"oid": hash_file(p, c), "size": len(c), "pointerSize": 134} for p, c in files.items()}
        return [
            {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
            | ({"lfs": large[p]} if p.endswith(LARGE) else {"oid": hash_file(p, c)})
            for p, c in files.items()
        ]

    def write_commit(self, folder: Path, lines: list[dict[str, Any]]) -> None:
        for key, value in ((line["key"], line["value"]) for line in lines):
            if key in ("file", "lfsFile"):
                content = base64.b64decode(value["content"]) if key == "file" else self.server.uploads[value["oid"]]
                (folder / value["path"]).parent.mkdir(parents=True, exist_ok=True)
                (folder / value["path"]).write_bytes(content)
            elif key == "deletedFile":
                (folder / value["path"]).unlink()

    def send_file(self, repo: str, revision: str, path: str, how: str) -> None:
        folder = self.open_repo(repo, revision)
        self.commit = {"X-Repo-Commit": hash_commit(folder)}
        if how == "resolve" and repo in self.server.gated and self.token not in self.server.gated[repo]:
            sentence = f"Access to model {repo} is restricted. Visit {self.server.endpoint}/{repo} to ask for access."
            raise Refused(401 if self.token is None else 403, "GatedRepo", sentence)
        if not (folder / path).is_file():
            raise Refused(404, "EntryNotFound", "Entry not found")
        content = (folder / path).read_bytes()
        headers = self.commit | {"ETag": f'"{hash_file(path, content)}"', "Accept-Ranges": "bytes"}
        if how == "resolve" and path.endswith(LARGE):  # such files are sent from elsewhere
            where = f"{self.server.endpoint}{self.path.replace('/resolve/', '/cdn/', 1)}"
            linked = {"X-Linked-Size": f"{len(content)}", "X-Linked-ETag": headers["ETag"], "Location": where}
            self.answer({}, 302, headers | linked)
        elif start := int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0]):
            rest = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            self.answer(content[start:], 206, headers | rest)
        else:
            self.answer(content, 200, headers)

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        is_file = isinstance(content, bytes)
        body = content if is_file else json.dumps(content).encode()
        self.send_response(status)
        kind = {"Content-Type": "application/octet-stream" if is_file else "application/json"}
        for name, value in (kind | {"Content-Length": f"{len(body)}"} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if is_file and self.server.cuts and len(body) > self.server.cuts[0]:
            self.wfile.write(body[: self.server.cuts.pop(0)])
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self.wfile.write(body)
