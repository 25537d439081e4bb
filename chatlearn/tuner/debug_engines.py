"""Stand-ins for the model while an agent is debugged: a list of answers, or a server's model.

Both are engines like any other (tokens in, tokens out), so that the recorder, the chat model and
the endpoint are those of training. A server speaks in messages: for it a plain template turns
messages into tokens that can be turned back, and its answers are written as this template has them.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections import Counter
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp

from chatlearn.cluster.agents import Agents, import_user_code
from chatlearn.config import GrpoConfig
from chatlearn.errors import ConfigError, EngineError, TrainerError
from chatlearn.interfaces import Engine, Weights
from chatlearn.models.engine.scripted import ScriptedEngine
from chatlearn.tuner.debug import Setup
from chatlearn.types import (
    Budget,
    Completion,
    Message,
    SamplingParams,
    Session,
    StopReason,
    Task,
    Trajectory,
)

CANNED = "I am a stand-in for the model. The answer is \\boxed{0}."
_START, _END = "<|im_start|>", "<|im_end|>"
_MESSAGE = re.compile(rf"{re.escape(_START)}(\w+)\n(.*?){re.escape(_END)}\n?", re.DOTALL)
_CALL = re.compile(r"\n?<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)
_TEMPLATE = """\
{%- if tools -%}{{ '<|im_start|>tools\\n' + (tools | tojson) + '<|im_end|>\\n' }}{%- endif -%}
{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\\n' + (m.content or '') }}
{%- for c in m.tool_calls or [] -%}
{{ '\\n<tool_call>\\n' + (c.function | tojson) + '\\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
_NO_LIMIT = 10**7
"""Tokens: of the plain tokenizer, which has one a byte, limits would say nothing."""
_TIMEOUT_S = 600.0
_PLAIN = "a plain"


class StandIn:
    """Agents of this process on an engine that is no model."""

    def __init__(self, cfg: GrpoConfig, engine: Engine, tokenizer: Any, eos: Collection[int]):
        import_user_code(cfg)
        self._agents, self._engine = Agents(cfg, tokenizer, eos), engine

    def validate(self, tasks: Sequence[Task]) -> list[Task]:
        return self._agents.validate(tasks)

    async def run_agent(
        self, task: Task, *, sampling: SamplingParams, budget: Budget, session: Session
    ) -> Trajectory:
        return await self._agents.run(
            task, engine=self._engine, sampling=sampling, budget=budget, session=session
        )


def scripted(cfg: GrpoConfig, answers: str | Path | None) -> Setup:
    """Answers from a file; without one a canned sentence, as often as it is asked for.

    Raises:
        ConfigError: the file is not a list of texts, or a list of such lists.
    """
    script = _read_answers(answers)
    tokenizer, eos, whose = _tokenizer(cfg)
    cfg = _without_limits(cfg) if whose == _PLAIN else cfg
    asked: Counter[str] = Counter()
    end = tokenizer.eos_token_id

    def say(prompt_ids: list[int], sampling: SamplingParams, session: Session) -> list[int]:
        sibling = int(session.run.partition(".")[0])
        texts = script[sibling % len(script)]
        number, asked[str(session)] = asked[str(session)], asked[str(session)] + 1
        if number >= len(texts) and answers is not None:
            raise EngineError(
                f"{answers} has {len(texts)} answers for run {sibling}, which asked for one more"
            )
        return [*tokenizer.encode(texts[number % len(texts)], add_special_tokens=False), end]

    said = f"{answers or 'a canned sentence'} answers ({whose} tokenizer): agent logic only"
    return Setup(StandIn(cfg, ScriptedEngine(say), tokenizer, eos), cfg, tokenizer, said)


@asynccontextmanager
async def url(cfg: GrpoConfig, base_url: str, model: str | None) -> AsyncIterator[Setup]:
    """The model of an OpenAI-compatible server; ``OPENAI_API_KEY`` is its key, if it needs one.

    Raises:
        EngineError: it does not answer, or serves no model.
    """
    tokenizer = plain_tokenizer()
    key = os.environ.get("OPENAI_API_KEY", "none")
    async with aiohttp.ClientSession(
        headers={"Authorization": f"Bearer {key}"}, timeout=aiohttp.ClientTimeout(_TIMEOUT_S)
    ) as http:
        limit = cfg.train_budget().turn_tokens
        engine = UrlEngine(http, base_url.rstrip("/"), model or "", tokenizer, max_tokens=limit)
        engine.model = model or await engine.first_model()
        plain = _without_limits(cfg)
        bench = StandIn(plain, engine, tokenizer, [tokenizer.eos_token_id])
        yield Setup(bench, plain, None, f"{engine.model} at {base_url} answers: agent logic only")


class UrlEngine:
    """A chat server as an engine: prompt tokens back to messages, its answer to tokens."""

    def __init__(
        self,
        http: aiohttp.ClientSession,
        base_url: str,
        model: str,
        tokenizer: Any,
        *,
        max_tokens: int,
    ) -> None:
        self.model = model
        self._http, self._base_url, self._tokenizer = http, base_url, tokenizer
        self._max_tokens = max_tokens

    async def first_model(self) -> str:
        """The name of the first model that the server lists."""
        listed = (await self._ask("GET", "/models")).get("data") or []
        if not listed:
            raise EngineError(f"{self._base_url}/models lists no model; give --engine-model")
        return str(listed[0]["id"])

    async def generate(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, *, session: Session
    ) -> Completion:
        messages, tools, begun = read_prompt(self._tokenizer.decode(prompt_ids))
        asked: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": min(self._max_tokens, sampling.max_new_tokens),
        }
        if tools:
            asked["tools"] = tools
            asked["tool_choice"] = "required" if begun else "auto"
        if sampling.stop:
            asked["stop"] = list(sampling.stop)
        reply = await self._ask("POST", "/chat/completions", asked)
        try:
            choice = reply["choices"][0]
            text = written(choice["message"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise EngineError(f"{self._base_url} answered {str(reply)[:200]}: {error!r}") from error
        if begun and not text.startswith(begun):
            raise EngineError(f"{self.model} was to begin with {begun!r}, and said {text[:80]!r}")
        ids = self._tokenizer.encode(text[len(begun) :], add_special_tokens=False)
        is_cut = choice.get("finish_reason") == "length"
        ids = ids if is_cut else [*ids, self._tokenizer.eos_token_id]
        reason = StopReason.LENGTH if is_cut else StopReason.STOP
        return Completion(ids, [0.0] * len(ids), reason, (0, 0))

    async def publish(self, weights: Weights, *, version: int) -> None:
        """The server's model stays: nothing is trained."""

    async def sleep(self) -> None:
        """Holds no memory."""

    async def wake(self) -> None:
        """Never slept."""

    async def abort(self, session: Session) -> None:
        """Each request ends with the run that awaits it."""

    async def _ask(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        address = self._base_url + path
        try:
            async with self._http.request(method, address, json=body) as response:
                text = await response.text()
                if response.status != 200:
                    raise EngineError(
                        f"{address} answered {response.status}: {text[:300]}; check --engine, "
                        "--engine-model and OPENAI_API_KEY"
                    )
                return json.loads(text)
        except (aiohttp.ClientError, asyncio.TimeoutError, json.JSONDecodeError) as error:
            raise EngineError(
                f"{address} does not answer as an OpenAI-compatible server does "
                f"({type(error).__name__}: {error}); check --engine"
            ) from error


def plain_tokenizer() -> Any:
    """One token a byte, and a template whose text can be read back into messages."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=_END, additional_special_tokens=[_START]
    )
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def read_prompt(text: str) -> tuple[list[Message], list[dict] | None, str]:
    """Messages and tools of a prompt that the plain template wrote, and what the assistant's turn
    was made to begin with."""
    messages: list[Message] = []
    tools, waiting, end = None, [], 0
    for found in _MESSAGE.finditer(text):
        role, content, end = found[1], found[2], found.end()
        if role == "tools":
            tools = json.loads(content)
        elif role == "tool":
            call_id = waiting.pop(0) if waiting else "call0"
            messages.append({"role": "tool", "tool_call_id": call_id, "content": content})
        elif role == "assistant":
            messages.append(_said(content, len(messages)))
            waiting = [call["id"] for call in messages[-1].get("tool_calls", [])]
        else:
            messages.append({"role": role, "content": content})
    return messages, tools, text[end:].removeprefix(f"{_START}assistant\n")


def _said(content: str, number: int) -> Message:
    """An assistant's message, with the tool calls that stand in its text."""
    calls = []
    for i, call in enumerate(_CALL.findall(content)):
        try:
            read = json.loads(call)
            name, arguments = read["name"], json.dumps(read["arguments"], ensure_ascii=False)
        except (ValueError, KeyError, TypeError):
            return {"role": "assistant", "content": content}
        calls.append(
            {
                "id": f"call{number}x{i}",
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
        )
    message: Message = {"role": "assistant", "content": _CALL.sub("", content)}
    return {**message, "tool_calls": calls} if calls else message


def written(message: Message) -> str:
    """A server's message as the text that the plain template's model would have said."""
    text = message.get("content") or ""
    for call in message.get("tool_calls") or []:
        function = call["function"]
        arguments = json.loads(function["arguments"] or "{}")
        body = json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False)
        text += (
            f"\n<tool_call>\n{body}\n</tool_call>"
            if text
            else (f"<tool_call>\n{body}\n</tool_call>")
        )
    return text


def _without_limits(cfg: GrpoConfig) -> GrpoConfig:
    """``cfg`` for the plain tokenizer."""
    limits = {
        "max_prompt_tokens_length": _NO_LIMIT,
        "max_response_tokens_length": _NO_LIMIT,
        "max_tokens_per_turn": _NO_LIMIT,
        "max_seq_len": 3 * _NO_LIMIT,
        "tool_parser": "hermes",
    }
    policy = cfg.models.policy.model_copy(update=limits)
    return cfg.model_copy(update={"models": cfg.models.model_copy(update={"policy": policy})})


def _tokenizer(cfg: GrpoConfig) -> tuple[Any, Collection[int], str]:
    """The model's tokenizer where it can be had, else the plain one; its end tokens; whose."""
    from transformers import GenerationConfig

    from chatlearn.models.policy.loading import eos_token_ids, load_tokenizer, source

    trust = cfg.models.policy_trainer.trust_remote_code
    try:
        tokenizer = load_tokenizer(cfg.policy_path, trust_remote_code=trust)
        where, _ = source(cfg.policy_path)
    except TrainerError:
        tokenizer = plain_tokenizer()
        return tokenizer, [tokenizer.eos_token_id], _PLAIN
    try:
        generation = GenerationConfig.from_pretrained(where)
    except (OSError, ValueError):
        generation = None
    model: Any = SimpleNamespace(generation_config=generation)
    return tokenizer, eos_token_ids(model, tokenizer), "the model's"


def _read_answers(path: str | Path | None) -> list[list[str]]:
    """One list of texts for each sibling, used in turn."""
    if path is None:
        return [[CANNED]]
    try:
        read = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--answers {path}: cannot be read as JSON: {error}") from error
    lists = [read] if isinstance(read, list) and all(isinstance(t, str) for t in read) else read
    if (
        not isinstance(lists, list)
        or not lists
        or not all(isinstance(texts, list) and texts for texts in lists)
        or not all(isinstance(text, str) for texts in lists for text in texts)
    ):
        raise ConfigError(
            f'--answers {path}: must be a list of texts, ["first call", "second call"], or one '
            "such list for each run of a task"
        )
    return lists
