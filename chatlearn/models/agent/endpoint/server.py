"""The HTTP side of the endpoint: one FastAPI app an event loop, for all doors opened in it.

It listens on 127.0.0.1 only, on a port the system chooses, from the first door to the end of the
loop. It takes no signals: Ctrl-C and SIGTERM stay the run's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import re
import socket
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextvars import Context

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol

from chatlearn.errors import AgentError, EngineError
from chatlearn.models.agent.chat.structured_output import with_note
from chatlearn.models.agent.endpoint.door import RUN_IS_OVER, Entrance
from chatlearn.models.agent.endpoint.request import ChatRequest, Refusal
from chatlearn.models.agent.endpoint.response import Choice, Reply, error_body
from chatlearn.models.agent.run import BudgetExhausted

MAX_BODY_BYTES = 32 * 2**20
MAX_HEADER_BYTES = 2**16
HEADERS_S = 10.0
"""How long a connection may take for the headers of its first request."""
BODY_S = 60.0
"""How long a request may take for its body."""
_KEEP_ALIVE_S = 75
"""Longer than clients keep an idle connection, so that none sends into a closing one."""
_REMEMBERED = 4096
"""Keys of ended runs that are told so."""
_NODE = re.compile(r"[A-Za-z_][\w.-]{0,63}(/[A-Za-z_][\w.-]{0,63}){0,7}", re.ASCII)

_servers: dict[asyncio.AbstractEventLoop, EndpointServer] = {}


class EndpointServer:
    """The server of one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._doors: dict[bytes, tuple[str, Entrance]] = {}
        self._over: OrderedDict[bytes, None] = OrderedDict()
        self._socket = _listen()
        self.base_url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"
        self._server = _Server(
            uvicorn.Config(
                _app(self),
                http=_Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                date_header=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            )
        )
        # an empty context: the server belongs to no run, also not to the one that came first
        self._task = Context().run(loop.create_task, self._serve())
        self._task.add_done_callback(lambda _: _servers.pop(loop, None))

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> EndpointServer:
        """That of the running ``loop``, started if there is none."""
        for ended in [other for other in _servers if other.is_closed()]:
            _servers.pop(ended)._socket.close()
        if loop not in _servers:
            _servers[loop] = cls(loop)
        return _servers[loop]

    def admit(self, key: str, entrance: Entrance) -> None:
        """Answer whoever has ``key`` from now on."""
        self._doors[_digest(key)] = key, entrance

    async def close_door(self, key: str) -> None:
        """End what is under way with ``key``, and refuse it from now on."""
        digest = _digest(key)
        self._over[digest] = None
        if len(self._over) > _REMEMBERED:
            self._over.popitem(last=False)
        _, entrance = self._doors.pop(digest)
        await entrance.close()

    def entrance(self, request: Request) -> Entrance:
        """The door that the key of ``request`` opens.

        Keys are found by their digest, so the time of a look-up says nothing about any key.

        Raises:
            Refusal: no key, a wrong one, or one whose run is over.
        """
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _unauthorized("no API key: send `Authorization: Bearer ` and door.api_key")
        digest = _digest(key.strip())
        expected, entrance = self._doors.get(digest, ("", None))
        is_right = hmac.compare_digest(expected.encode(), key.strip().encode())
        if entrance is None or not is_right:
            raise _unauthorized(
                RUN_IS_OVER if digest in self._over else "wrong API key: each agent run has its own"
            )
        if entrance.is_over:
            raise _unauthorized(RUN_IS_OVER)
        return entrance

    async def _serve(self) -> None:
        try:
            await self._server.serve(sockets=[self._socket])
        finally:  # the loop is ending: uvicorn closes nothing when its task is cancelled
            for server in getattr(self._server, "servers", []):
                server.close()
            for connection in list(self._server.server_state.connections):
                connection.transport.abort()
            self._socket.close()


def _listen() -> socket.socket:
    """A socket of this machine on a free port.

    Its protocol is named, for asyncio sends at once (TCP_NODELAY) only where it is: otherwise head
    and body of each answer are 40 ms apart.
    """
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    listening.listen(1024)
    return listening


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Protocol(H11Protocol):
    """Hangs up on a connection that sends no request."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._deadline = self.loop.call_later(HEADERS_S, self._hang_up)

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        super().connection_lost(exc)

    def _hang_up(self) -> None:
        if self.cycle is None:
            self.transport.close()


def _app(server: EndpointServer) -> FastAPI:
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        model = _model(server.entrance(request))
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request) -> Response:
        return JSONResponse(_model(server.entrance(request)))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        try:
            return await _chat(server.entrance(request), request)
        except asyncio.CancelledError:  # by the end of the loop; uvicorn would call it a failure
            return _error("the training has ended", 503, "ended")

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> Response:
        return _error(str(error), error.status, error.code)

    @app.exception_handler(BudgetExhausted)
    async def exhausted(request: Request, error: BudgetExhausted) -> Response:
        return _error(str(error), 400, "context_length_exceeded")

    @app.exception_handler(AgentError)
    async def misused(request: Request, error: AgentError) -> Response:
        return _error(str(error), 400, "invalid_request")

    @app.exception_handler(EngineError)
    async def failed(request: Request, error: EngineError) -> Response:
        return _error(str(error), 503, "engine_error")

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        exists = "POST /v1/chat/completions, GET /v1/models"
        said = f"{request.method} {request.url.path}: {error.detail}; there are {exists}"
        return _error(said, error.status_code, "not_found")

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:  # uvicorn logs the traceback
        return _error(f"chatlearn failed: {type(error).__name__}: {error}", 500, "internal_error")

    return app


async def _chat(entrance: Entrance, request: Request) -> Response:
    node = request.headers.get("x-chatlearn-node", "")
    if node and not _NODE.fullmatch(node):
        raise Refusal(
            f"x-chatlearn-node: {node!r} is not a node's name: letters, digits, _ . - and / "
            "between names, beginning with a letter"
        )
    wanted = ChatRequest.read(await _body(request))
    messages = with_note(entrance.answers.messages(wanted.messages), wanted.response_format)
    wish = wanted.wish(entrance.policy.parser)
    asks = []
    try:
        for _ in range(wanted.n or 1):
            asks.append(entrance.ask(messages, wish, node))
        await _finish(asks, request)
        is_heard = all(task.done() for task in asks)
    finally:
        for task in asks:
            task.cancel()
    if not is_heard:
        return Response(status_code=499)  # nobody reads it
    if any(task.cancelled() for task in asks) or entrance.is_over:
        raise _unauthorized(RUN_IS_OVER)
    answers = [task.result() for task in asks]
    only_first = wanted.parallel_tool_calls is False
    choices = [Choice.of(turn, said, only_first_call=only_first) for turn, said in answers]
    for choice, (_, said) in zip(choices, answers, strict=True):
        entrance.answers.remember(wanted.messages, choice.content, choice.call_ids, said)
    tokenizer = entrance.policy.tokenizer
    name = f"chatcmpl-{answers[0][1].id}"
    reply = Reply(name, entrance.policy.name, choices, tokenizer, bool(wanted.logprobs))
    if not wanted.stream:
        return JSONResponse(reply.body())
    options = wanted.stream_options
    events = reply.events(include_usage=options is not None and options.include_usage)
    return Response("".join(events), media_type="text/event-stream")


async def _finish(asks: list[asyncio.Task], request: Request) -> None:
    """Until all ``asks`` are done, or the client has gone."""
    gone = asyncio.ensure_future(_disconnected(request))
    pending: set[asyncio.Future] = set(asks)
    try:
        while pending and not gone.done():
            _, pending = await asyncio.wait({*pending, gone}, return_when=asyncio.FIRST_COMPLETED)
            pending.discard(gone)
    finally:
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> bytes:
    size = request.headers.get("content-length", "0")
    if size.isdigit() and int(size) > MAX_BODY_BYTES:
        raise _too_large()
    body = bytearray()

    async def read() -> None:
        async for piece in request.stream():
            body.extend(piece)
            if len(body) > MAX_BODY_BYTES:
                raise _too_large()

    try:
        await asyncio.wait_for(read(), BODY_S)
    except asyncio.TimeoutError:
        said = f"the body took longer than {BODY_S:g} s"
        raise Refusal(said, status=408, code="timeout") from None
    return bytes(body)


def _model(entrance: Entrance) -> dict[str, object]:
    name = entrance.policy.name
    return {"id": name, "object": "model", "created": int(time.time()), "owned_by": "chatlearn"}


def _error(message: str, status: int, code: str) -> Response:
    # what failed here fails again: OpenAI's clients shall not retry, but for too many at once
    headers = {"x-should-retry": "true" if status == 429 else "false"}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(message, status=status, code=code), status, headers)


def _unauthorized(message: str) -> Refusal:
    return Refusal(message, status=401, code="invalid_api_key")


def _too_large() -> Refusal:
    said = f"the body is larger than {MAX_BODY_BYTES} bytes"
    return Refusal(said, status=413, code="request_too_large")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
