"""The environment service: a real server on a socket, its client, and what goes wrong between."""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import asynccontextmanager

import aiohttp
import pytest
import uvicorn
from aiohttp import web

from chatlearn.data.dataset_config import DatasetConfig
from chatlearn.data.environment.client import EnvironmentClient
from chatlearn.data.environment.protocol import Evaluation, Step
from chatlearn.data.environment.server import Instances, environment_app, serve
from chatlearn.errors import AgentError, ConfigError, DataError, EngineError, EnvironmentLost
from chatlearn.models.agent.examples.frozen_lake import FrozenLake


class Guess:
    """Guess the number of the task. ``step`` is plain, ``evaluate`` async."""

    released: list[str]

    @classmethod
    def tasks(cls, split):
        return [{"task_id": "7", "query": "Which number?", "split": split}]

    def create(self, task_id, params):
        self.number, self.most = {"7": 7}[task_id], params.get("most", 9)
        self.busy = False
        return f"1 to {self.most}"

    def step(self, action):
        assert not self.busy, "two calls of one instance overlap"
        self.busy = True
        threading.Event().wait(0.01)
        self.busy = False
        if action == "raise":
            raise StopIteration("no more")
        if action == "junk":
            return "not a step"
        if action == "hang":
            threading.Event().wait(0.6)
        said = "right" if action == self.number else "wrong"
        return Step(said, reward=float(said == "right"), done=said == "right", info={"n": action})

    async def evaluate(self, messages):
        return Evaluation(float("nan") if messages == [{}] else 0.5, {"heard": len(messages)})

    def release(self):
        self.released.append("released")


@asynccontextmanager
async def served(app):
    """The URL of a server that is up until the end of the block."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    server.capture_signals = nothing
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving
        listening.close()


@asynccontextmanager
async def guessing(*, api_key="", **settings):
    Guess.released = []
    instances = Instances(Guess, **settings)
    async with served(environment_app(instances, api_key=api_key)) as url:
        yield url, instances


def nothing():
    import contextlib

    return contextlib.nullcontext()


async def test_an_instance_is_played_and_given_back():
    async with guessing() as (url, instances):
        async with EnvironmentClient(url).instance("7", {"most": 20}) as env:
            assert env.state == "1 to 20"
            assert await env.step(3) == Step("wrong", 0.0, False, {"n": 3})
            assert await env.step(7) == Step("right", 1.0, True, {"n": 7})
            assert (env.state, env.done) == ("right", True)
            messages = [{"role": "user", "content": "7?"}]
            assert await env.evaluate(messages) == Evaluation(0.5, {"heard": 1})
            assert (len(instances), Guess.released) == (1, [])
        assert (len(instances), Guess.released) == (0, ["released"])


async def test_an_instance_is_given_back_however_the_run_ends():
    async def play(url):
        async with EnvironmentClient(url).instance("7"):
            await asyncio.sleep(60)

    async with guessing() as (url, instances):
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(play(url), 0.2)
        with pytest.raises(ZeroDivisionError):
            async with EnvironmentClient(url).instance("7"):
                1 / 0  # noqa: B018
        assert (len(instances), len(Guess.released)) == (0, 2)


async def test_calls_of_one_instance_wait_for_each_other():
    async with guessing() as (url, _), EnvironmentClient(url).instance("7") as env:
        steps = await asyncio.gather(*(env.step(n) for n in range(8)))
        assert [step.info["n"] for step in steps] == list(range(8))


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("raise", r"/step was refused \(500\): Guess.step raised .*no more"),
        ("junk", "step returned str; it must return a Step"),
        (object(), "what was to be sent is not JSON"),
    ],
)
async def test_what_the_environment_or_the_agent_did_wrong_is_an_agent_error(action, message):
    async with guessing() as (url, _), EnvironmentClient(url).instance("7") as env:
        with pytest.raises(AgentError, match=message):
            await env.step(action)
        assert (await env.step(7)).done  # the service lives on


async def test_a_score_that_is_no_number_is_refused():
    async with guessing() as (url, _), EnvironmentClient(url).instance("7") as env:
        with pytest.raises(AgentError, match="returned something that is not JSON"):
            await env.evaluate([{}])


async def test_unknown_tasks_and_keys():
    async with guessing(api_key="secret") as (url, _):
        with pytest.raises(AgentError, match=r"no bearer key.*set \$CHATLEARN_ENVIRONMENT_KEY"):
            await EnvironmentClient(url, api_key="wrong").tasks("train")
        client = EnvironmentClient(url, api_key="secret")
        with pytest.raises(AgentError, match=r"/create was refused \(404\): there is no task '8'"):
            async with client.instance("8"):
                pass
        async with aiohttp.ClientSession(headers={"Authorization": "Bearer secret"}) as http:
            async with http.post(f"{url}/step", json={"action": 1}) as answer:
                assert answer.status == 422
                said = (await answer.json())["error"]
                assert said["message"] == "/step: instance_id: Field required"
            async with http.get(f"{url}/steps") as answer:
                assert (
                    "there are GET /tasks, POST /create"
                    in (await answer.json())["error"]["message"]
                )


async def test_an_instance_nobody_asks_for_expires_and_is_lost_to_its_run():
    lost = []
    async with guessing(idle_s=0.1) as (url, instances):
        async with EnvironmentClient(url, on_lost=lost.append).instance("7") as env:
            await asyncio.sleep(0.3)
            assert (len(instances), Guess.released) == (0, ["released"])
            with pytest.raises(
                EnvironmentLost, match=r"/step was refused.*expired after 0.1 s"
            ) as e:
                await env.step(7)
        assert lost == [e.value]
        assert isinstance(e.value, EngineError)  # the outcome of the run: tried again, never 0


async def test_who_finds_a_service_full_waits_for_room():
    async def play(url):
        async with EnvironmentClient(url).instance("7"):
            pass

    async with guessing(max_instances=1) as (url, _):
        async with EnvironmentClient(url).instance("7"):
            with pytest.raises(EnvironmentLost, match="/create has no room: 1 instances are open"):
                async with EnvironmentClient(url, patience_s=0.1).instance("7"):
                    pass
            waiting = asyncio.create_task(play(url))
            await asyncio.sleep(0.1)
        await waiting
        assert len(Guess.released) == 2


async def test_a_call_that_takes_too_long_is_lost_by_name():
    async with guessing() as (url, _):
        client = EnvironmentClient(url, timeout_s=0.2)
        with pytest.raises(EnvironmentLost, match=r"/step gave no answer in 0\.2 s"):
            async with client.instance("7") as env:
                await env.step("hang")


async def test_only_verbs_that_may_be_repeated_are_asked_again():
    """A service that hangs up on the first request of each verb."""
    seen: list[str] = []

    async def answer(request):
        seen.append(request.path)
        if seen.count(request.path) == 1 and request.path != "/create":
            request.transport.close()
        return web.json_response({"tasks": [], "instance_id": "i", "state": ""})

    app = web.Application()
    app.router.add_route("*", "/{verb}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    client = EnvironmentClient(f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}")
    assert await client.tasks("train") == []
    async with client.instance("7"):
        pass
    with pytest.raises(EnvironmentLost, match="/step was lost before it answered"):
        async with client.instance("7") as env:
            await env.step(1)
    await runner.cleanup()
    assert [seen.count(f"/{verb}") for verb in ("tasks", "release", "step")] == [2, 2, 1]


async def test_rows_come_from_the_service_also_inside_an_event_loop():
    async with guessing() as (url, _):
        config = DatasetConfig(url, split="test")
        rows = await asyncio.to_thread(config.read)
        assert rows == [{"task_id": "7", "query": "Which number?", "split": "test"}]
        with pytest.raises(DataError, match="has no subsets"):
            DatasetConfig(url, subset="main").read()


async def test_a_service_that_is_down_is_a_data_error_with_its_url():
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:9/tasks cannot be reached.*start it"):
        DatasetConfig("http://127.0.0.1:9").read()
    with pytest.raises(AgentError, match="give its URL, such as"):
        EnvironmentClient("127.0.0.1:9")


def test_what_may_not_be_served():
    with pytest.raises(ConfigError, match=r"--host 0\.0\.0\.0 lets other machines in, and no key"):
        serve(Guess, host="0.0.0.0")
    with pytest.raises(ConfigError, match="object is not an environment: it lacks tasks, create"):
        Instances(object)


def test_the_lake():
    """::

    P _ _ O
    O _ _ _
    _ O O _
    _ _ _ G
    """
    lake = FrozenLake()
    assert lake.create("lake-3", {}) == "P _ _ O\nO _ _ _\n_ O O _\n_ _ _ G"
    assert lake.step("I say: UP!").state == lake.step("up, down").state
    assert lake.step("hm").state.startswith("Say up, down, left or right.\nP")
    assert lake.evaluate([]).score == 0.0
    for move in ("right", "right", "down"):
        assert not lake.step(move).done
    assert lake.evaluate([]).score == 0.25
    for move in ("right", "down"):
        lake.step(move)
    assert lake.step("down") == Step(
        "_ _ _ O\nO _ _ _\n_ O O _\n_ _ _ P", 1.0, True, {"move": "down"}
    )
    assert lake.evaluate([]) == Evaluation(1.0, {"steps": 9, "success": True})
    assert lake.step("up").state.startswith("The game is over.")
    wet = FrozenLake()
    wet.create("lake-3", {})
    assert wet.step("down").done
    assert wet.evaluate([]) == Evaluation(0.0, {"steps": 1, "success": False})
    assert len({FrozenLake().create(t["task_id"], {}) for t in FrozenLake.tasks("train")}) > 32
