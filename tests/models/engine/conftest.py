"""One real SGLang server for the whole session (marker ``sglang``), and a stand-in that refuses."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from chatlearn.models.engine.sglang_server import ServerSettings, SGLangServer

MAX_CONTEXT = 500


@pytest.fixture(scope="session")
def server_settings(sglang_python, tiny_policy) -> ServerSettings:
    return ServerSettings(
        model_path=tiny_policy,
        python=sglang_python,
        device="cpu",
        dtype="fp32",
        context_length=MAX_CONTEXT,
        max_running_requests=64,
    )


@pytest.fixture(scope="session")
def sglang_server(server_settings, tmp_path_factory):
    """The server that all tests share; each must leave it running, awake and not paused."""
    log = tmp_path_factory.mktemp("sglang") / "server.log"
    server = SGLangServer(server_settings, log_file=log)
    asyncio.run(server.start(timeout_s=240))
    yield server
    asyncio.run(server.stop())


class Script:
    """An HTTP server that answers what it is told, path by path, and remembers what it was asked.

    An answer is ``(status, object)``; ``None`` closes the connection without a word; a
    ``threading.Event`` holds the request back until it is set, and then answers {}.
    """

    def __init__(self) -> None:
        self.answers: dict[str, object] = defaultdict(lambda: (200, {"success": True}))
        self.asked: list[tuple[str, dict]] = []
        script = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                path = self.path.partition("?")[0]
                script.asked.append((path, json.loads(body or b"{}")))
                answer = script.answers[path]
                if isinstance(answer, threading.Event):
                    answer.wait(20)
                    answer = (200, {})
                if answer is None:
                    self.close_connection = True
                    return
                status, said = answer
                data = said.encode() if isinstance(said, str) else json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST

            def log_message(self, *args): ...

        class Server(ThreadingHTTPServer):
            def handle_error(self, *args): ...  # clients that hang up are what is tested

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def script():
    server = Script()
    yield server
    server.close()


def is_running(pid: int) -> bool:
    """A zombie, which waits for a parent that may never ask, has ended too."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


@pytest.fixture
def family():
    """Living processes of the session that a process leads."""

    def members(leader: int) -> list[int]:
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        found = []
        for pid in filter(is_running, pids):
            try:
                if os.getsid(pid) == leader:
                    found.append(pid)
            except ProcessLookupError:
                continue
        return found

    return members
