"""The keywords of a call, as ``bind`` and ``invoke`` take them, as what the policy is asked for.

Nothing silently does nothing: a keyword acts, or changes nothing that is true here, or is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from types import MappingProxyType
from typing import Any

from chatlearn.errors import AgentError
from chatlearn.models.agent.asking import Wish
from chatlearn.models.agent.chat.bound_tools import called_tool, hides_tools, shown_tools

SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "max_tokens",
    "max_completion_tokens",
    "max_new_tokens",
    "seed",
    "stop",
)
"""Keywords that say how to sample; ``sampling_params`` is a dict of them, ChatLearn's way."""

_OTHERS = ("tools", "tool_choice", "response_format", "sampling_params", "n", "model")

_HARMLESS = frozenset(
    {
        "extra_headers",
        "ls_structured_output_format",
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "safety_identifier",
        "service_tier",
        "store",
        "stream",
        "stream_options",
        "stream_usage",
        "strict",
        "structured_output_format",
        "user",
    }
)
"""What providers know and what changes no token here. ``parallel_tool_calls`` and ``strict`` ask
for constrained decoding, which the policy never has (see ``with_structured_output``)."""

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "echo": (False,),
    "frequency_penalty": (0,),
    "ignore_eos": (False,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_p": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "return_logprob": (False,),
    "top_logprobs": (0,),
}
"""Keywords accepted only with the value that changes nothing."""


def wish_of(
    asked: Mapping[str, Any],
    stop: Sequence[str] | None,
    parser: Any,
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> Wish:
    """What a call asks for.

    Args:
        asked: keywords of the call; None is as if it were not given.
        stop: LangChain's own ``stop``.
        parser: ``ToolParser``; knows how a call is forced.
        defaults: sampling where the call says nothing.

    Raises:
        AgentError: a keyword that is not known, or a value that cannot be.
    """
    given = {k: v for k, v in asked.items() if v is not None}
    settings = given.pop("sampling_params", {})
    if not isinstance(settings, Mapping):
        raise AgentError(f"sampling_params={settings!r} of self.llm must be a dict of settings")
    own = {k: v for k, v in settings.items() if v is not None}
    for key, value in own.items():
        _check_known(key, value, "sampling_params", SAMPLING)
    for key, value in given.items():
        _check_known(key, value, "self.llm", (*SAMPLING, *_OTHERS))
    if given.get("n", 1) != 1:
        raise AgentError(
            f"n={given['n']!r} of self.llm: one call is one turn; ask several times instead: "
            "await self.llm.abatch([messages] * n)"
        )
    sampling = {**defaults, **own, **{k: given[k] for k in SAMPLING if k in given}}
    if stop is not None:
        sampling["stop"] = stop
    tools = shown_tools(given.get("tools") or ())
    choice = given.get("tool_choice")
    return Wish(
        tools=tools if tools and not hides_tools(choice) else None,
        must_call=called_tool(choice, tools, parser),
        stop=stop_strings(sampling.get("stop", ())),
        temperature=_number("temperature", sampling, 0, math.inf),
        top_p=_number("top_p", sampling, 0, 1, open_below=True),
        top_k=_top_k(sampling),
        max_tokens=_max_tokens(sampling),
        seed=_integer("seed", sampling, -math.inf),
    )


def stop_strings(value: Any) -> tuple[str, ...]:
    """``stop`` as a tuple.

    Raises:
        AgentError: it is not texts, or one of them is empty.
    """
    texts = (value,) if isinstance(value, str) else tuple(value or ())
    if not all(isinstance(text, str) and text for text in texts):
        raise AgentError(
            f"stop={value!r} of self.llm: give strings that are not empty, as in stop=['\\n\\n']"
        )
    return texts


def _check_known(key: str, value: Any, where: str, known: Sequence[str]) -> None:
    if key in known or (key in _HARMLESS and where == "self.llm"):
        return
    if key in _NEUTRAL:
        if value in _NEUTRAL[key]:
            return
        raise AgentError(
            f"{key}={value!r} of {where}: tokens are trained under the distribution that sampled "
            f"them, which {key} would change; leave it out, or use temperature, top_p and top_k"
        )
    raise AgentError(f"{key}={value!r} of {where} is not known; known: {', '.join(known)}")


def _number(
    key: str, asked: Mapping[str, Any], low: float, high: float, *, open_below: bool = False
) -> float | None:
    value = asked.get(key)
    if value is None:
        return None
    is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not low <= value <= high or (open_below and value == low):
        span = f"at least {low}" if math.isinf(high) else f"above {low} and at most {high}"
        raise AgentError(f"{key}={value!r} of self.llm: it must be a number, {span}")
    return float(value)


def _integer(key: str, asked: Mapping[str, Any], low: float) -> int | None:
    value = asked.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        least = "" if math.isinf(low) else f", at least {low}"
        raise AgentError(f"{key}={value!r} of self.llm: it must be a whole number{least}")
    return value


def _top_k(asked: Mapping[str, Any]) -> int | None:
    value = asked.get("top_k")
    if value == -1 or value is None:
        return value
    try:
        return _integer("top_k", asked, 1)
    except AgentError as error:
        raise AgentError(f"{error}, or -1 for no limit") from None


def _max_tokens(asked: Mapping[str, Any]) -> int | None:
    names = ("max_tokens", "max_completion_tokens", "max_new_tokens")
    given = [n for name in names if (n := _integer(name, asked, 1)) is not None]
    return min(given, default=None)
