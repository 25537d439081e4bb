"""The LangChain face of the policy: ``self.llm`` of every agent.

Each call finds out which recorded turn it continues, appends the tokens of only the new messages to
the tokens held, asks the engine, and records the turn. Nothing of that hides in messages.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage, InvalidToolCall, ToolCall
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import ConfigDict, Field, PrivateAttr

from chatlearn.errors import AgentError, EngineError
from chatlearn.models.agent.messages import to_openai
from chatlearn.models.agent.prompt_builder import PromptBuilder
from chatlearn.models.agent.recorder import BudgetExhausted, Run, current_run
from chatlearn.models.agent.tool_parser import HermesParser, NoToolParser, ParsedText
from chatlearn.types import Completion, SamplingParams, StopReason, Turn

_FORCED = "tool_choice={!r} cannot be forced on the policy: its tokens are sampled, not edited"


class CustomChatModel(BaseChatModel):
    """The policy as a LangChain chat model.

    An agent is given one as ``self.llm``. Code written for ChatLearn builds its own from it,
    ``CustomChatModel(model=name, llm=self.llm, tokenizer=self.tokenizer)``, which also puts
    ``token_ids`` and ``loss_mask`` of the row so far into ``response_metadata``, as such code reads
    them.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, populate_by_name=True)

    model_name: str = Field(default="policy", alias="model")
    llm: Any = None
    """The agent's ``self.llm``, for code written for ChatLearn; None for ``self.llm`` itself."""
    tokenizer: Any = None
    processor: Any = None
    model_type: str = "llm"
    prompts: Any = None
    """``PromptBuilder`` of the model."""
    parser: HermesParser | NoToolParser | None = None

    _reads_token_metadata: bool = PrivateAttr(default=False)

    def model_post_init(self, context: Any, /) -> None:
        super().model_post_init(context)
        if self.llm is not None:
            self._reads_token_metadata = True
            self.prompts, self.parser = self.llm.prompts, self.llm.parser
            self.tokenizer = self.tokenizer or self.llm.tokenizer
        if not isinstance(self.prompts, PromptBuilder) or self.parser is None:
            raise AgentError(
                "CustomChatModel needs llm=self.llm of the agent it is built in (or a "
                "PromptBuilder and a tool parser)"
            )

    @property
    def _llm_type(self) -> str:
        return "chatlearn"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"model_name": self.model_name}

    def bind_tools(
        self, tools: Sequence[Any], *, tool_choice: Any = None, **kwargs: Any
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Show ``tools`` to the model through its chat template.

        Raises:
            AgentError: ``tool_choice`` asks for a call the policy did not choose.
        """
        if tool_choice not in (None, False, "auto", "none"):
            raise AgentError(_FORCED.format(tool_choice))
        schemas = [] if tool_choice == "none" else [convert_to_openai_tool(t) for t in tools]
        for schema in schemas:  # LangChain lists a tool function's **kwargs as an argument
            schema["function"].get("parameters", {}).get("properties", {}).pop("kwargs", None)
        return self.bind(tools=schemas, **kwargs)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        run = current_run()
        if _running_loop() is run.loop:
            raise AgentError(
                "self.llm.invoke() was called on the event loop, which it would block for ever; "
                "use `await self.llm.ainvoke(...)` in async code (`await graph.ainvoke(...)` in "
                "run()), or make the node a plain def"
            )
        turn = self._turn(run, messages, stop, run_manager, kwargs)
        return asyncio.run_coroutine_threadsafe(turn, run.loop).result()

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        run = current_run()
        turn = self._turn(run, messages, stop, run_manager, kwargs)
        if _running_loop() is run.loop:
            return await turn
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(turn, run.loop))

    async def _turn(
        self,
        run: Run,
        messages: list[BaseMessage],
        stop: list[str] | None,
        run_manager: Any,
        kwargs: dict[str, Any],
    ) -> ChatResult:
        started = time.perf_counter()
        tools = kwargs.get("tools") or None
        recorder = run.recorder
        digests = recorder.chain(messages, _opening(tools))
        parent, covered = recorder.parent(messages, digests)
        new = [to_openai(m) for m in messages[covered:]]
        if parent is None:
            prompt_ids = self.prompts.first(new, tools)
        else:
            answer = to_openai(messages[covered - 1])
            prompt_ids = self.prompts.extend(parent.token_ids, answer, new, tools)
        recorder.counts["forks"] += parent is None and bool(recorder.turns)
        recorder.counts["tool_errors"] += sum(
            m.type == "tool" and getattr(m, "status", "") == "error" for m in messages[covered:]
        )
        sampling = self._sampling(run, prompt_ids, stop, kwargs)
        built = time.perf_counter()
        try:
            completion = await run.engine.generate(prompt_ids, sampling, session=run.session)
        except EngineError as error:
            run.engine_error = run.engine_error or error
            raise
        turn = Turn(
            id=len(recorder.turns),
            parent=None if parent is None else parent.id,
            prompt_ids=prompt_ids,
            completion=completion,
            timings={"prompt_s": built - started, "engine_s": time.perf_counter() - built},
            **_graph_position(run_manager),
        )
        message = self._message(run, turn, sampling)
        recorder.record(turn, messages, message)
        recorder.remember(recorder.chain([message], digests[-1])[0], message, turn)
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _sampling(
        self, run: Run, prompt_ids: list[int], stop: list[str] | None, kwargs: dict[str, Any]
    ) -> SamplingParams:
        """Sampling of this call: the run's, within what is left of its budget."""
        base, budget = run.sampling, run.budget
        asked = {**(kwargs.get("sampling_params") or {}), **kwargs}
        for key in ("temperature", "top_p", "top_k"):
            if asked.get(key) is not None and asked[key] != getattr(base, key):
                raise AgentError(
                    f"{key}={asked[key]} was asked of a call, but this run samples at "
                    f"{getattr(base, key)}; set models.policy.{key} (all turns are trained at one)"
                )
        if "n" in kwargs and kwargs["n"] != 1:
            raise AgentError("n > 1 is not supported in one call; await several calls instead")
        limits = [
            ("models.policy.max_tokens_per_turn", budget.turn_tokens),
            (
                "models.policy.max_response_tokens_length",
                budget.rollout_tokens - run.recorder.sampled_tokens,
            ),
            ("models.policy.max_seq_len", budget.context_tokens - len(prompt_ids)),
        ]
        if asked.get("max_tokens") is not None:
            limits.append(("max_tokens", int(asked["max_tokens"])))
        key, left = min(limits, key=lambda limit: limit[1])
        if left < 1:
            run.recorder.exhausted = run.recorder.exhausted or key
            raise BudgetExhausted(
                f"no tokens left for another turn: {key} is used up (prompt of "
                f"{len(prompt_ids)} tokens, {run.recorder.sampled_tokens} sampled so far)"
            )
        return replace(
            base,
            max_new_tokens=left,
            stop=(*base.stop, *(stop or ())),
            seed=run.recorder.seed(base.seed, run.session, prompt_ids),
        )

    def _message(self, run: Run, turn: Turn, sampling: SamplingParams) -> AIMessage:
        text = self._text(turn.completion, sampling)
        parsed = self.parser.parse(text)
        run.recorder.counts["tool_calls"] += len(parsed.calls)
        run.recorder.counts["invalid_tool_calls"] += sum(c.error is not None for c in parsed.calls)
        sampled = len(turn.completion.token_ids)
        metadata: dict[str, Any] = {
            "finish_reason": str(turn.completion.stop_reason),
            "model_name": self.model_name,
        }
        if self._reads_token_metadata:
            metadata["token_ids"] = turn.token_ids
            metadata["loss_mask"] = _loss_mask(run.recorder.turns, turn)
        return AIMessage(
            id=f"turn-{run.session}-{turn.id}",
            content=parsed.content,
            additional_kwargs={"reasoning_content": parsed.reasoning} if parsed.reasoning else {},
            tool_calls=[
                ToolCall(name=c.name, args=c.arguments, id=f"call_{turn.id}_{i}", type="tool_call")
                for i, c in enumerate(parsed.calls)
                if c.error is None
            ],
            invalid_tool_calls=_invalid_calls(parsed, turn),
            response_metadata=metadata,
            usage_metadata=UsageMetadata(
                input_tokens=len(turn.prompt_ids),
                output_tokens=sampled,
                total_tokens=len(turn.prompt_ids) + sampled,
            ),
        )

    def _text(self, completion: Completion, sampling: SamplingParams) -> str:
        """Text of a completion without its end-of-turn token and from its stop string on."""
        ids = completion.token_ids
        if completion.stop_reason is StopReason.STOP and ids and ids[-1] in self.prompts.eos_ids:
            ids = ids[:-1]
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        cuts = [text.find(s) for s in sampling.stop if s in text]
        return text[: min(cuts)] if cuts else text


def _invalid_calls(parsed: ParsedText, turn: Turn) -> list[InvalidToolCall]:
    return [
        InvalidToolCall(
            name=call.name,
            args=call.arguments if isinstance(call.arguments, str) else str(call.arguments),
            id=f"call_{turn.id}_{i}",
            error=call.error,
            type="invalid_tool_call",
        )
        for i, call in enumerate(parsed.calls)
        if call.error is not None
    ]


def _loss_mask(turns: list[Turn], turn: Turn) -> list[int]:
    """1 where ``turn`` or one of its ancestors sampled the token. [P + C]"""
    mask = [0] * len(turn.prompt_ids) + [1] * len(turn.completion.token_ids)
    while turn.parent is not None:
        turn = turns[turn.parent]
        start = len(turn.prompt_ids)
        mask[start : start + len(turn.completion.token_ids)] = [1] * len(turn.completion.token_ids)
    return mask


def _opening(tools: list[dict] | None) -> bytes:
    """Stands for the tools in the chain of digests: other tools are another conversation."""
    return repr(tools).encode() if tools else b""


def _graph_position(run_manager: Any) -> dict[str, Any]:
    """Where in the graph the call was made, from LangGraph's own run metadata."""
    metadata = getattr(run_manager, "metadata", None) or {}
    tags = getattr(run_manager, "tags", None) or []
    return {
        "node": str(metadata.get("langgraph_node", "")),
        "checkpoint_ns": str(metadata.get("langgraph_checkpoint_ns", "")),
        "step": int(metadata.get("langgraph_step", 0)),
        "tags": tuple(t for t in tags if not t.startswith("seq:step:")),
    }


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
