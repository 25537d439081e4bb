"""The LangChain face of the policy: ``self.llm`` of every agent.

Each call finds out which recorded turn it continues, appends the tokens of only the new messages to
the tokens held, asks the engine, and records the turn (``asking.py``). Nothing of that hides in
messages. docs/langgraph.md has what works and what is refused.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableLambda
from pydantic import ConfigDict, Field, PrivateAttr

from chatlearn.errors import AgentError
from chatlearn.models.agent.asking import Policy, Position, ask
from chatlearn.models.agent.attempts import starting_call
from chatlearn.models.agent.chat import structured_output
from chatlearn.models.agent.chat.bound_tools import called_tool, shown_tools
from chatlearn.models.agent.chat.call_settings import SAMPLING, wish_of
from chatlearn.models.agent.chat.message_chunks import cut
from chatlearn.models.agent.messages import to_openai
from chatlearn.models.agent.parsers.segments import PlainParser
from chatlearn.models.agent.prompt_builder import PromptBuilder
from chatlearn.models.agent.run import Run, current_run, on_loop, running_loop
from chatlearn.types import Turn

_TRACED = ("temperature", "max_tokens")


class CustomChatModel(BaseChatModel):
    """The policy as a LangChain chat model.

    An agent is given one as ``self.llm``. Code written for ChatLearn builds its own from it,
    ``CustomChatModel(model=name, llm=self.llm, tokenizer=self.tokenizer)``, which also puts
    ``token_ids`` and ``loss_mask`` of the row so far into ``response_metadata``, as such code reads
    them.

    Sampling fields (``temperature`` … ``seed``) are defaults of every call of this object; None is
    as ``models.policy`` and ``node_sampling`` say. ``self.llm.model_copy(update={...})`` and
    ``self.llm.bind(...)`` set them for a part of a graph.

    Raises:
        AgentError: a setting that cannot be, or a cache: what it answers was not sampled.
    """

    model_config = ConfigDict(
        arbitrary_types_allowed=True,
        populate_by_name=True,
        extra="forbid",
        protected_namespaces=(),
    )

    model_name: str = Field(default="policy", alias="model")
    llm: Any = Field(default=None, repr=False)
    """The agent's ``self.llm``, for code written for ChatLearn; None for ``self.llm`` itself."""
    tokenizer: Any = Field(default=None, repr=False)
    processor: Any = Field(default=None, repr=False)
    model_type: str = "llm"
    prompts: Any = Field(default=None, repr=False)
    """``PromptBuilder`` of the model."""
    parser: Any = Field(default=None, repr=False)
    """``ToolParser`` of the model."""
    max_input_tokens: int | None = None
    """Longest context, for ``profile``: middleware reads it to know when to summarise."""
    temperature: Any = None
    top_p: Any = None
    top_k: Any = None
    max_tokens: Any = None
    seed: Any = None
    stop: Any = None
    streaming: bool | None = None
    """True: ``invoke`` tells callbacks of chunks too; False: ``stream`` answers in one piece."""
    cache: Any = False
    """Never one. False also keeps LangChain's global cache (``set_llm_cache``) from answering."""

    _reads_token_metadata: bool = PrivateAttr(default=False)

    def model_post_init(self, context: Any, /) -> None:
        super().model_post_init(context)
        if self.cache:
            raise AgentError(
                f"cache={self.cache!r} of CustomChatModel: an answer from a cache was not sampled "
                "in this run, so it has no tokens to train; give the cache to frozen models "
                "(runtime_args.auxiliary_models) only"
            )
        self.cache = False  # None would ask LangChain's global cache
        if self.llm is not None:
            self._reads_token_metadata = True
            self.prompts, self.parser = self.llm.prompts, self.llm.parser
            self.tokenizer = self.tokenizer or self.llm.tokenizer
            self.max_input_tokens = self.max_input_tokens or self.llm.max_input_tokens
        if not isinstance(self.prompts, PromptBuilder) or self.parser is None:
            raise AgentError(
                "CustomChatModel needs llm=self.llm of the agent it is built in (or a "
                "PromptBuilder and a tool parser)"
            )
        wish_of({}, None, self.parser, self._defaults)

    @property
    def _llm_type(self) -> str:
        return "chatlearn"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"model_name": self.model_name, **self._defaults}

    @property
    def _defaults(self) -> dict[str, Any]:
        """Sampling fields that are set, as keywords of a call."""
        fields = type(self).model_fields
        given = {key: getattr(self, key) for key in SAMPLING if key in fields}
        return {key: value for key, value in given.items() if value is not None}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> Any:
        named = {k: v for k in _TRACED if (v := kwargs.get(k, getattr(self, k))) is not None}
        return {
            "ls_provider": "chatlearn",
            "ls_model_type": "chat",
            "ls_model_name": kwargs.get("model") or self.model_name,
            **{f"ls_{key}": value for key, value in named.items()},
            **({"ls_stop": list(stop or self.stop)} if stop or self.stop else {}),
        }

    def _resolve_model_profile(self) -> Any:
        """What LangChain's agents decide by. ``structured_output`` means constrained decoding."""
        size = {} if self.max_input_tokens is None else {"max_input_tokens": self.max_input_tokens}
        return {
            **size,
            "text_inputs": True,
            "image_inputs": False,
            "audio_inputs": False,
            "video_inputs": False,
            "text_outputs": True,
            "tool_calling": not isinstance(self.parser, PlainParser),
            "tool_choice": self._can_force,
            "structured_output": False,
        }

    @property
    def _can_force(self) -> bool:
        return self.parser.prefix(None) is not None

    @property
    def policy(self) -> Policy:
        """What every call needs of the model."""
        return Policy(self.tokenizer, self.prompts, self.parser, self.model_name)

    def bind_tools(
        self, tools: Sequence[Any], *, tool_choice: Any = None, **kwargs: Any
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Show ``tools`` to the model through its chat template.

        Args:
            tools: LangChain tools, functions, pydantic classes, TypedDicts or OpenAI schemas.
            tool_choice: None or "auto": the model is free. "any", "required" or True: its turn
                begins with the opening of a call. A tool's name, or OpenAI's dict of it: with the
                opening of that call. What it is made to begin with is context and is not trained.
                "none": the tools are not shown.
            kwargs: see ``call_settings``.

        Raises:
            AgentError: not a tool; no tool of that name; calls cannot be forced in this format.
        """
        schemas = shown_tools(tools)
        called_tool(tool_choice, schemas, self.parser)  # refused here, not in the middle of a run
        if tool_choice not in (None, False):
            kwargs["tool_choice"] = tool_choice
        return self.bind(tools=schemas, **kwargs)

    def with_structured_output(
        self,
        schema: structured_output.Schema | None = None,
        *,
        method: str = "function_calling",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Answers as objects of ``schema``. Decoding is not constrained, by no method: that would
        sample from another distribution than the one that is trained.

        Args:
            schema: a pydantic class (objects are validated), a TypedDict or a JSON schema (a dict
                is returned). json_mode alone can do without.
            method: "function_calling": the object is the arguments of a forced call, or of a free
                one where the format cannot force any. "json_schema": a note with the schema is put
                at the end of the system message. "json_mode": nothing is said to the model; the
                prompt should.
            include_raw: return ``{"raw", "parsed", "parsing_error"}`` and raise nothing.
            strict: accepted, and changes nothing: reading is always strict.
            kwargs: for ``bind_tools``, or for every call.

        Raises:
            AgentError: an unknown method, or not a schema.
            langchain_core.exceptions.OutputParserException: when called, where the answer holds no
                such object.
        """
        if method not in structured_output.METHODS:
            known = ", ".join(structured_output.METHODS)
            raise AgentError(f"method={method!r} of with_structured_output; known: {known}")
        if schema is None and method != "json_mode":
            raise AgentError(f"with_structured_output(method={method!r}) needs a schema")
        traced = {"kwargs": {"method": method}, "schema": schema}
        if schema is not None:
            kwargs["ls_structured_output_format"] = traced
        tool = None
        if method == "function_calling":
            [shown] = shown_tools([schema])
            tool = shown["function"]["name"]
            choice = tool if self._can_force else None
            model = self.bind_tools([shown], tool_choice=choice, **kwargs)
        elif method == "json_schema":
            asked = structured_output.response_format(schema)
            model = self.bind(response_format=asked, **kwargs)
        else:
            model = self.bind(response_format={"type": "json_object"}, **kwargs)
        read = structured_output.reader(schema, tool=tool, include_raw=include_raw)
        return model | RunnableLambda(read, name="read_structured_output")

    def get_token_ids(self, text: str) -> list[int]:
        """Ids of ``text`` by the policy's tokenizer, without special tokens around it."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def get_num_tokens_from_messages(
        self, messages: Sequence[BaseMessage], tools: Sequence[Any] | None = None
    ) -> int:
        """Tokens of the prompt that the chat template makes of ``messages``.

        Where the template refuses a list (a part of a conversation that begins with a tool's
        answer, as ``trim_messages`` counts), those of each message's text.
        """
        rows = [to_openai(m) for m in messages]
        schemas = shown_tools(tools or ()) or None
        try:
            text = self.prompts.template.render(rows, schemas, generation=True)
        except AgentError:
            text = "".join(r["content"] + json.dumps(r.get("tool_calls", "")) for r in rows)
        return len(self.get_token_ids(text))

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return _result(self._answer(messages, stop, run_manager, kwargs))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return _result(await self._aanswer(messages, stop, run_manager, kwargs))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        for chunk in cut(self._answer(messages, stop, run_manager, kwargs)):
            yield ChatGenerationChunk(message=chunk)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        for chunk in cut(await self._aanswer(messages, stop, run_manager, kwargs)):
            yield ChatGenerationChunk(message=chunk)

    def _answer(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None,
        run_manager: Any,
        kwargs: dict[str, Any],
    ) -> AIMessage:
        run = current_run()
        if running_loop() is run.loop:
            raise AgentError(
                "self.llm.invoke() was called on the event loop, which it would block for ever; "
                "use `await self.llm.ainvoke(...)` in async code (`await graph.ainvoke(...)` in "
                "run()), or make the node a plain def"
            )
        turn = self._turn(run, messages, stop, run_manager or starting_call(), kwargs)
        return asyncio.run_coroutine_threadsafe(turn, run.loop).result()

    async def _aanswer(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None,
        run_manager: Any,
        kwargs: dict[str, Any],
    ) -> AIMessage:
        run = current_run()
        turn = self._turn(run, messages, stop, run_manager or starting_call(), kwargs)
        return await on_loop(run.loop, turn)

    async def _turn(
        self,
        run: Run,
        messages: list[BaseMessage],
        stop: list[str] | None,
        call: Any,
        kwargs: Mapping[str, Any],
    ) -> AIMessage:
        if kwargs.get("model") not in (None, self.model_name):
            raise AgentError(
                f"model={kwargs['model']!r} of self.llm: the policy is {self.model_name!r}; another"
                " model is one of runtime_args.auxiliary_models"
            )
        wish = wish_of(kwargs, stop, self.parser, self._defaults)
        noted = structured_output.with_note(messages, kwargs.get("response_format"))
        turn, message = await ask(run, self.policy, noted, wish, Position.of(call))
        if self._reads_token_metadata:
            message.response_metadata["token_ids"] = turn.token_ids
            message.response_metadata["loss_mask"] = _loss_mask(run.recorder.turns, turn)
        return message


def _result(message: AIMessage) -> ChatResult:
    return ChatResult(generations=[ChatGeneration(message=message)])


def _loss_mask(turns: list[Turn], turn: Turn) -> list[int]:
    """1 where ``turn`` or one of its ancestors sampled the token. [P + C]"""
    mask = [0] * len(turn.prompt_ids) + [1] * len(turn.completion.token_ids)
    while turn.parent is not None:
        turn = turns[turn.parent]
        start = len(turn.prompt_ids)
        mask[start : start + len(turn.completion.token_ids)] = [1] * len(turn.completion.token_ids)
    return mask
