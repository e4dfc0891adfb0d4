"""An object store on this machine: moto's S3 server, behind a door that may be slow, cut answers off, or fail.

with ObjectStore() as store:
    store.use_here(monkeypatch)  # in this process and those that it starts
    store.upload(folder, "bucket/photos")
"""

from __future__ import annotations

import http.client
import itertools
import logging
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import fsspec
import pytest
from moto.server import ThreadedMotoServer

from dino.data import ranges

PASSED_ON = {
    "connection",
    "transfer-encoding",
    "content-length",
    "server",
    "date",
}  # headers that the door writes itself


class ObjectStore(ThreadingHTTPServer):
    """The door. Of what is asked for from inside a file, every `fails`-th answer is an error, every `cuts`-th is cut off.

    `refuses_signed`: who asks at a signed address gets nothing.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Door)
        self.delay, self.fails, self.cuts, self.refuses_signed = 0.0, 0, 0, False
        self.asked: list[str] = []  # the ranges of files
        self.signed = 0  # of these, at signed addresses
        self.numbers = itertools.count(1)
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # of the server behind
        self.behind = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)

    def __enter__(self) -> ObjectStore:
        self.behind.start()
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()
        self.behind.stop()

    def handle_error(self, *_: object) -> None:
        """Say nothing of clients that have hung up."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def environment(self, home: Path) -> dict[str, str]:
        keys = {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
        return keys | {"AWS_ENDPOINT_URL": self.url, "HOME": str(home), "DINO_CACHE": str(home / "cache")}

    def use_here(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        for name, value in self.environment(home).items():
            monkeypatch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        ranges._sign.cache_clear()  # of addresses at the store of another test

    def upload(self, folder: Path, place: str) -> str:
        """Put the files of a folder at BUCKET/PREFIX; the address."""
        bucket, _, prefix = place.partition("/")
        behind, keys = f"http://127.0.0.1:{self.behind.get_host_and_port()[1]}", {"aws_access_key_id": "me"}
        client: Any = boto3.client("s3", endpoint_url=behind, aws_secret_access_key="secret", **keys)
        client.create_bucket(Bucket=bucket)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                client.upload_file(str(path), bucket, os.path.join(prefix, path.relative_to(folder).as_posix()))
        return f"s3://{place}"


class Door(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ObjectStore

    def do_GET(self) -> None:
        store, wanted = self.server, self.headers.get("Range")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        behind = http.client.HTTPConnection(*store.behind.get_host_and_port())
        behind.request(self.command, self.path, body, dict(self.headers))
        answer = behind.getresponse()
        content, status, length = answer.read(), answer.status, answer.headers.get("Content-Length", "0")
        behind.close()
        time.sleep(store.delay)
        file, _, query = self.path.partition("?")
        is_signed = "Signature=" in query
        is_file = self.command == "GET" and (is_signed or not query) and status < 300
        number = next(store.numbers) if is_file else 1
        if is_file:
            store.asked.append(f"{file} {wanted}")
            store.signed += is_signed
            if store.fails and number % store.fails == 0:
                status, content = 503, b""
                length = "0"
            elif store.refuses_signed and is_signed:
                status, content = 403, b""
        self.send_response(status)
        for name, value in answer.headers.items():
            is_checksum = name.lower().startswith("x-amz-checksum")  # an error is not what was asked for
            if name.lower() not in PASSED_ON and not (is_checksum and status >= 400):
                self.send_header(name, value)
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if is_file and store.cuts and number % store.cuts == 0:
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        else:
            self.wfile.write(content)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def log_message(self, *_: object) -> None:
        pass
