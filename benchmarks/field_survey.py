"""The long workload of ``trl_side_by_side.py``: an agent that asks a tool again and again.

    [ system prompt with the tool's schema, 600 tokens | question ]
    [ thoughts, a call ] [ a record of 45 tokens ] [ thoughts, a call ] ... [ thoughts, an answer ]

Of the thoughts, most are short (6 words) and one in seven is long (60 words on average), as those
of real policies are skewed. A run has at most 6 calls of the model and ends after each with
probability 0.1, so most contexts grow to 1,000 tokens and more. The answer is yes or no, and right
by chance: nearly every group has a signal, which is the dearest case for chatlearn, who leaves out
rows without one.

The policy is of the tiny model's shape and is not trained: its weights are made such that each
token depends on the one before it, with the probabilities of ``CHAIN``. Its layers compute all
that layers compute; what they add is small.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

MAX_CALLS = 6
MAX_TOKENS = 1600
"""Of a rollout after its prompt, records included."""
SOURCE = "benchmarks/field_survey"

CALL, CALLED = '\n<tool_call>\n{"name": "measure", "arguments": {"site": "', '"}}\n</tool_call>'
ANSWER, ANSWERED = "\nThe answer is \\boxed{", "}."
SHORT = (" so", " now", " then", " well")
LONG = (" the site", " is dry", " we see", " not yet", " and low")
DIGITS = tuple("0123456789")
END = "<|im_end|>"


def _evenly(share: float, tokens: tuple[str, ...]) -> dict[str, float]:
    return {token: share / len(tokens) for token in tokens}


CHAIN: dict[str, dict[str, float]] = {
    "\n": {**_evenly(0.85, SHORT), **_evenly(0.15, LONG)},  # the end of a prompt
    **{word: {**_evenly(5 / 6, SHORT), CALL: 0.9 / 6, ANSWER: 0.1 / 6} for word in SHORT},
    **{word: {**_evenly(59 / 60, LONG), CALL: 0.9 / 60, ANSWER: 0.1 / 60} for word in LONG},
    CALL: _evenly(1.0, DIGITS),
    **{digit: {**_evenly(0.5, DIGITS), CALLED: 0.5} for digit in DIGITS},
    CALLED: {END: 1.0},
    ANSWER: {"yes": 0.5, "no": 0.5},
    "yes": {ANSWERED: 1.0},
    "no": {ANSWERED: 1.0},
    ANSWERED: {END: 1.0},
}
"""What follows each token that the policy writes."""
NEVER = 1e-9
"""Probability of every other token."""
NOTES = ("dry", "low", "wet", "high")

SCHEMA = {
    "type": "function",
    "function": {
        "name": "measure",
        "description": "Read the newest record of a site.",
        "parameters": {
            "type": "object",
            "properties": {"site": {"type": "string", "description": "A number of two digits."}},
            "required": ["site"],
        },
    },
}
SYSTEM = (
    "You look after the sites of a survey. Think first, then call the tool once, and read what it "
    "says before you call it again. Do not guess a record, and do not ask for a site twice. When "
    "you have seen enough, say yes or no in a box.\n"
    f"The tool:\n{json.dumps(SCHEMA)}\n"
    "A call is a JSON object with a name and arguments, between the markers, at the end of what "
    "you write. The record has the site, the depth and the level in millimetres, and a note of "
    "whoever was there last. Levels below the depth are errors of the gauge."
)


def record(site: str) -> str:
    """What the tool says of a site; the same each time."""
    draw = random.Random(site)
    depth, level, state = draw.randrange(1000), draw.randrange(1000), draw.choice(NOTES)
    return f'{{"site": "{site}", "depth": {depth}, "level": {level}, "note": "{state} {state}"}}'


def measure(site: str) -> str:
    """Read the newest record of a site.

    Args:
        site: A number of two digits.

    Returns:
        The record.
    """
    return record(site)


def said_so(response: str, ground_truth: str, **_: Any) -> float:
    """The reward: 1 where the box says what is asked for."""
    return float(f"boxed{{{ground_truth}}}" in response)


def question(draw: random.Random) -> list[dict[str, str]]:
    asked = f"Is site {draw.randint(10, 99)} as dry as site {draw.randint(10, 99)}?"
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": asked}]


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Prompts as a dataset has them."""
    draw = random.Random(seed)
    return [
        {
            "agent_name": "field_survey",
            "agent_cfg_path": None,
            "data_source": SOURCE,
            "prompt": question(draw),
            "reward_model": {"style": "rule", "ground_truth": draw.choice(("yes", "no"))},
        }
        for _ in range(count)
    ]


def make_policy(model: str, folder: Path) -> None:
    """Write to ``folder`` a policy of the shape and with the template of ``model``."""
    import torch
    from tokenizers import AddedToken
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False) for t in (CALL, CALLED, ANSWER, ANSWERED, *SHORT, *LONG)]
    )
    tokenizer.add_tokens([AddedToken("yes", single_word=True), AddedToken("no", single_word=True)])
    ids = {token: tokenizer.convert_tokens_to_ids(_spelt(token)) for token in CHAIN}
    ids[END] = tokenizer.eos_token_id
    config = AutoConfig.from_pretrained(model)
    config.vocab_size, config.tie_word_embeddings = len(tokenizer), False
    config.max_position_embeddings = 4096
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for layer in policy.model.layers:
            layer.self_attn.o_proj.weight *= 0.1
            layer.mlp.down_proj.weight *= 0.1
        # a token that the chain knows has a direction of its own; the norm makes it this long
        size = config.hidden_size**0.5
        policy.lm_head.weight.zero_()
        for number, (token, following) in enumerate(CHAIN.items()):
            policy.model.embed_tokens.weight[:, number] = 0.0
            policy.model.embed_tokens.weight[ids[token]] = 0.0
            policy.model.embed_tokens.weight[ids[token], number] = 1.0
            column = torch.full((len(tokenizer),), math.log(NEVER))
            for after, probability in following.items():
                column[ids[after]] = math.log(probability)
            policy.lm_head.weight[:, number] = column / size
    policy.generation_config.eos_token_id = tokenizer.eos_token_id
    policy.generation_config.pad_token_id = tokenizer.pad_token_id
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _spelt(token: str) -> str:
    """A token of one byte as byte-level tokenizers spell it."""
    return {"\n": "Ċ"}.get(token, token)
