"""A small service around any ``Environment`` class: each instance is an object of its own.

uvicorn ── FastAPI ── Instances ── one object an instance, its calls one after another
                          └─ a sweeper releases what nobody asked for in ``idle_s``
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import inspect
import ipaddress
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from chatlearn.data.environment import protocol
from chatlearn.data.environment.protocol import Environment
from chatlearn.errors import AgentError, ConfigError, boundary

logger = logging.getLogger(__name__)

IDLE_S = 1800.0
MAX_INSTANCES = 4096
_VERBS = ("create", "step", "evaluate", "release")


class Create(BaseModel):
    task_id: str
    params: dict[str, Any] = Field(default_factory=dict)


class Act(BaseModel):
    instance_id: str
    action: Any = None


class Evaluate(BaseModel):
    instance_id: str
    messages: list[dict[str, Any]] | None = None


class Release(BaseModel):
    instance_id: str


class Refused(Exception):
    """An answer that is not a success; see the codes of ``protocol``."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(slots=True, eq=False)
class _Instance:
    environment: Environment
    task_id: str
    last_used: float
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Instances:
    """Who plays what.

    Args:
        environment: the class; must have ``tasks`` and the four verbs.
        idle_s: an instance nobody asks for so long is released.
    """

    def __init__(
        self,
        environment: type[Environment],
        *,
        idle_s: float = IDLE_S,
        max_instances: int = MAX_INSTANCES,
    ) -> None:
        missing = [v for v in ("tasks", *_VERBS) if not callable(getattr(environment, v, None))]
        if missing or not inspect.isclass(environment):
            raise ConfigError(
                f"{getattr(environment, '__qualname__', environment)!s} is not an environment: "
                f"it lacks {', '.join(missing) or 'being a class'}; see "
                "chatlearn.data.environment.protocol.Environment"
            )
        self.environment, self.idle_s, self._most = environment, idle_s, max_instances
        self._open: dict[str, _Instance] = {}

    def __len__(self) -> int:
        return len(self._open)

    async def tasks(self, split: str) -> dict[str, Any]:
        found = list(await self._call(self.environment.tasks, "tasks", split))
        return {"tasks": found}

    async def create(self, task_id: str, params: dict[str, Any]) -> dict[str, Any]:
        if len(self._open) >= self._most:
            said = f"{self._most} instances are open; release some, or start with more"
            raise Refused(503, protocol.FULL, said)
        instance_id = secrets.token_hex(16)
        environment = await self._call(self.environment, "create")
        instance = _Instance(environment, task_id, time.monotonic())
        self._open[instance_id] = instance  # counted while it is made
        try:
            async with instance.lock:
                state = await self._call(environment.create, "create", task_id, params)
        except BaseException as error:
            del self._open[instance_id]
            if isinstance(error.__cause__, KeyError):
                said = f"there is no task {task_id!r}"
                raise Refused(404, protocol.UNKNOWN_TASK, said) from error
            raise
        return {"instance_id": instance_id, "state": state}

    async def step(self, instance_id: str, action: Any) -> dict[str, Any]:
        async with self._using(instance_id) as instance:
            said = await self._call(instance.environment.step, "step", action)
        return _object(said, "step")

    async def evaluate(self, instance_id: str, messages: list[dict[str, Any]]) -> dict[str, Any]:
        async with self._using(instance_id) as instance:
            said = await self._call(instance.environment.evaluate, "evaluate", messages)
        return {"score": said} if isinstance(said, int | float) else _object(said, "evaluate")

    async def release(self, instance_id: str) -> None:
        """Also fine for one that is released already."""
        instance = self._open.pop(instance_id, None)
        if instance is not None:
            async with instance.lock:
                await self._call(instance.environment.release, "release")

    async def expire(self) -> None:
        """Release what nobody asked for in ``idle_s``."""
        oldest = time.monotonic() - self.idle_s
        for instance_id, instance in list(self._open.items()):
            if instance.last_used < oldest and not instance.lock.locked():
                logger.warning("instance %s of %s expires", instance_id, instance.task_id)
                with contextlib.suppress(Refused):
                    await self.release(instance_id)

    async def close(self) -> None:
        for instance_id in list(self._open):
            with contextlib.suppress(Refused):
                await self.release(instance_id)

    @asynccontextmanager
    async def _using(self, instance_id: str) -> AsyncIterator[_Instance]:
        instance = self._open.get(instance_id)
        if instance is None:
            said = f"there is no instance {instance_id}: it was released, has expired after "
            said += f"{self.idle_s:g} s, or the service was started again"
            raise Refused(404, protocol.UNKNOWN_INSTANCE, said)
        async with instance.lock:
            try:
                yield instance
            finally:
                instance.last_used = time.monotonic()

    async def _call(self, function: Callable[..., Any], verb: str, *arguments: Any) -> Any:
        """User code: plain functions in a thread, what they raise as a refusal."""
        where = f"{self.environment.__qualname__}.{verb}"

        def call() -> Any:
            with boundary(AgentError, where):  # in the thread: a future can't carry StopIteration
                return function(*arguments)

        try:
            if not inspect.iscoroutinefunction(function):
                return await asyncio.to_thread(call)
            with boundary(AgentError, where):
                return await function(*arguments)
        except AgentError as error:
            logger.warning("%s", error)
            cause = error.__cause__ or error
            said = f"{where} raised {type(cause).__name__}: {cause}"
            raise Refused(500, protocol.ENVIRONMENT_ERROR, said) from cause


def environment_app(instances: Instances, *, api_key: str = "") -> FastAPI:
    """The service of ``instances``; with ``api_key`` it asks everyone for it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        sweeper = asyncio.create_task(_sweep(instances))
        try:
            yield
        finally:
            sweeper.cancel()
            await instances.close()

    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, lifespan=lifespan)

    @app.middleware("http")
    async def admit(request: Request, answer: Callable[[Request], Any]) -> Response:
        given = request.headers.get("authorization", "").encode()
        if api_key and not hmac.compare_digest(given, f"Bearer {api_key}".encode()):
            return _error(401, protocol.UNAUTHORIZED, "no bearer key, or a wrong one")
        return await answer(request)

    @app.get("/tasks")
    async def tasks(split: str = "train") -> Response:
        return _json(await instances.tasks(split))

    @app.post("/create")
    async def create(body: Create) -> Response:
        return _json(await instances.create(body.task_id, body.params))

    @app.post("/step")
    async def step(body: Act) -> Response:
        return _json(await instances.step(body.instance_id, body.action))

    @app.post("/evaluate")
    async def evaluate(body: Evaluate) -> Response:
        return _json(await instances.evaluate(body.instance_id, body.messages or []))

    @app.post("/release")
    async def release(body: Release) -> Response:
        await instances.release(body.instance_id)
        return _json({})

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return _error(error.status, error.code, str(error))

    @app.exception_handler(RequestValidationError)
    async def wrong(request: Request, error: RequestValidationError) -> Response:
        problems = "; ".join(
            f"{'.'.join(map(str, p['loc'][1:]))}: {p['msg']}" for p in error.errors()
        )
        return _error(422, protocol.BAD_REQUEST, f"{request.url.path}: {problems}")

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        said = f"{request.method} {request.url.path}: {error.detail}; there are GET /tasks, "
        said += ", ".join(f"POST /{verb}" for verb in _VERBS)
        return _error(error.status_code, protocol.BAD_REQUEST, said)

    return app


def serve(
    environment: type[Environment],
    *,
    host: str = "127.0.0.1",
    port: int = 8765,
    api_key: str = "",
    idle_s: float = IDLE_S,
    max_instances: int = MAX_INSTANCES,
) -> None:
    """Serve ``environment`` until the process is told to end.

    Raises:
        ConfigError: it is not an environment, or others than this machine could reach it and no
            key is set.
    """
    if not api_key and not _is_loopback(host):
        raise ConfigError(
            f"--host {host} lets other machines in, and no key is set; set "
            f"${protocol.KEY_VARIABLE} here and where the agents run, or keep --host 127.0.0.1"
        )
    instances = Instances(environment, idle_s=idle_s, max_instances=max_instances)
    app = environment_app(instances, api_key=api_key)
    uvicorn.run(app, host=host, port=port, log_level="warning", access_log=False)


async def _sweep(instances: Instances) -> None:
    while True:
        await asyncio.sleep(min(instances.idle_s / 4, 30.0))
        await instances.expire()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _object(said: Any, verb: str) -> dict[str, Any]:
    if is_dataclass(said) and not isinstance(said, type):
        return asdict(said)
    if isinstance(said, dict):
        return said
    message = f"{verb} returned {type(said).__name__}; it must return a Step, an Evaluation, a "
    raise Refused(500, protocol.ENVIRONMENT_ERROR, message + "number (evaluate) or a dict")


def _json(body: dict[str, Any]) -> Response:
    try:
        return JSONResponse(body)
    except (TypeError, ValueError) as error:
        said = f"the environment returned something that is not JSON: {error}"
        return _error(500, protocol.ENVIRONMENT_ERROR, said)


def _error(status: int, code: str, message: str) -> Response:
    return JSONResponse({"error": {"code": code, "message": message}}, status)
