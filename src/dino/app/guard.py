"""Who may use the explorer, and what may be asked of it: checked before a request reaches Gradio."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import re
import secrets
import socket
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

FIRST_PORT, NUM_PORTS = 7860, 100  # to try when the user names none
LOOPBACK = {"127.0.0.1", "localhost", "::1", "[::1]"}  # names of this machine for itself
EVERY_NETWORK = ("0.0.0.0", "::")
UPLOAD = "/gradio_api/upload"
# All that the page asks for. Gradio serves much more: its own interface for programs, files by path, proxies.
NEEDED = re.compile(
    r"GET (/|/theme\.css|/favicon\.ico|/(assets|static)/.*|/gradio_api/(queue/data|upload_progress|heartbeat/\w+))"
    r"|GET /gradio_api/file=(?P<file>.*)|POST /gradio_api/(queue/join|upload)"
)
LARGEST_UPLOAD = 40 * 2**20  # bytes of a file
LARGEST_CALL = 2**16  # bytes of any other request
MOST_KEPT, MOST_FILES = 8 * LARGEST_UPLOAD, 2000  # bytes and number of temporary files; the oldest are deleted
MOST_BODIES = 4  # requests that are received at the same time
SECONDS = 300  # that a request may take to arrive


def find_host(share_with: str) -> str:
    """The address to listen at."""
    return {"nobody": "127.0.0.1", "everyone": "0.0.0.0"}.get(share_with, share_with)


def listen(host: str, port: int | None) -> socket.socket:
    """A socket that accepts connections; without a `port`, at the first free one from FIRST_PORT.

    Raises:
        ValueError: the host is none of this machine, or the port is taken or not allowed.
    """
    for number in range(FIRST_PORT, FIRST_PORT + NUM_PORTS) if port is None else [port]:
        try:
            return socket.create_server((host, number), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise ValueError(
                    f"--share-with {host} is no address of this machine ({error.strerror}); leave it out to share with "
                    "nobody, or use --share-with everyone."
                ) from error
    what = f"all ports from {FIRST_PORT} to {FIRST_PORT + NUM_PORTS - 1} are" if port is None else f"--port {port} is"
    raise ValueError(f"{what} taken, or none that you may use; choose another with --port.")


def delete_oldest(folder: str, kept: set[str]) -> None:
    """Delete the oldest files in `folder`, except those `kept`, until at most MOST_KEPT bytes in MOST_FILES are left."""
    with contextlib.suppress(FileNotFoundError):  # Gradio deletes files as well
        files = [file for file in Path(folder).rglob("*") if file.is_file() and str(file) not in kept]
        total = 0
        for rank, file in enumerate(sorted(files, key=lambda file: -file.stat().st_mtime)):
            total += file.stat().st_size
            if total > MOST_KEPT or rank >= MOST_FILES:
                file.unlink()


class Guard:
    """Passes on what a browser with the token asks for the page, and refuses everything else in one sentence.

    A page of another site could make the user's browser send requests here. The Host header tells the name that the
    browser knows this server by, which is not ours when another site's name was made to lead here (DNS rebinding). The
    Origin header tells whose page sends. Other users of the machine have no token.
    """

    def __init__(self, app: ASGIApp, folder: str, host: str, listening: socket.socket):
        """`folder` holds all files that may be served; those there now are never deleted."""
        self.app, self.folder, self.seconds = app, folder, SECONDS
        self.kept = {str(file) for file in Path(folder).rglob("*")}
        self.token = secrets.token_urlsafe()
        address, port = listening.getsockname()[:2]
        self.cookie = f"dino-{port}"  # all ports of a host share their cookies
        # On every network this machine has names that only others know. A rebound name has no cookie of ours.
        given = {f"[{name}]" if ":" in name else name.lower() for name in (host, address)}
        self.names = None if address in EVERY_NETWORK else LOOPBACK | given
        shown = socket.gethostname() if address in EVERY_NETWORK else f"[{host}]" if ":" in host else host
        self.address = f"http://{shown}:{port}/?token={self.token}"
        self.bodies = asyncio.Semaphore(MOST_BODIES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the server starts or ends
            return await self.app(scope, receive, send)
        request = Request(scope, receive)
        try:
            self._check(request)
            if request.method == "GET":
                return await (self._enter(request) or self.app)(scope, receive, send)
            async with self.bodies:
                messages: list[Message] = [{"type": "http.request", "body": await self._read(request)}]

                async def repeat() -> Message:
                    return messages.pop() if messages else await receive()

                await self.app(scope, repeat, send)
        except HTTPException as refused:
            await PlainTextResponse(refused.detail, refused.status_code)(scope, receive, send)
        except ClientDisconnect:
            pass

    def _check(self, request: Request) -> None:
        """Refuse whoever may not ask, and what may not be asked."""
        host = request.headers.get("host", "").lower()
        if self.names is not None and re.sub(r":\d+$", "", host) not in self.names:  # any port, for ssh -L
            raise HTTPException(403, "The explorer does not answer to this host name.")
        if request.headers.get("origin", f"http://{host}").lower().partition("://")[2] != host:
            raise HTTPException(403, "The explorer does not answer to pages of other sites.")
        given = request.query_params.get("token", ""), request.cookies.get(self.cookie, "")
        if not any(secrets.compare_digest(token.encode(), self.token.encode()) for token in given):
            raise HTTPException(403, "Open the address that dino app printed, with its token.")
        asked = NEEDED.fullmatch(f"{request.method} {request.scope['path']}")
        if asked is None or (asked["file"] is not None and not self._holds(asked["file"])):
            raise HTTPException(403, "The explorer does not serve this.")

    def _enter(self, request: Request) -> Response | None:
        """From the printed address to the page, with a cookie; None for all else."""
        if request.scope["path"] != "/" or "token" not in request.query_params:
            return None
        headers = {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer", "Location": "/"}
        answer = Response(None, 303, headers)
        if request.headers.get("sec-fetch-site") == "cross-site":  # a link in a chat: a redirect would lack the cookie
            answer = Response(None, 200, headers | {"Refresh": "0; url=/"})
        answer.set_cookie(self.cookie, self.token, httponly=True, samesite="strict")
        return answer

    async def _read(self, request: Request) -> bytes:
        """The body of an upload, or of a call of one of the page's functions.

        A call is passed on as it was understood here. Gradio copies the file of a "path", or fetches it from the network.
        """
        delete_oldest(self.folder, self.kept)
        body, upload = bytearray(), request.scope["path"] == UPLOAD
        try:
            async with asyncio.timeout(self.seconds):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > LARGEST_CALL + upload * LARGEST_UPLOAD:
                        raise HTTPException(413, "This is larger than the explorer takes.")
            return bytes(body) if upload else json.dumps(json.loads(body, object_hook=self._check_path)).encode()
        except TimeoutError:
            raise HTTPException(408, "This took too long to arrive.") from None
        except (ValueError, RecursionError):
            raise HTTPException(400, "The page does not send such a request.") from None

    def _check_path(self, value: dict[str, object]) -> dict[str, object]:
        if "path" in value and not self._holds(value["path"]):
            raise ValueError
        return value

    def _holds(self, path: object) -> bool:
        """Whether `path` lies in the folder; a question of its letters, for which no file is looked at."""
        return isinstance(path, str) and os.path.normpath(path).startswith(self.folder + os.sep)
