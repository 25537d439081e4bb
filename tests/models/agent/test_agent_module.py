"""The registry, user modules and agent YAML: what is refused, and in which words."""

from __future__ import annotations

import textwrap

import pytest
from langgraph.graph import START, MessagesState, StateGraph

from chatlearn.errors import AgentError, ConfigError
from chatlearn.models.agent import BaseAgentGraph, register
from chatlearn.models.agent.agent_module import AgentFactory, agent_class, import_modules

AGENT = """
from langgraph.graph import START, MessagesState, StateGraph
from chatlearn.models.agent import BaseAgentGraph, register

@register("{name}")
class Mine(BaseAgentGraph):
    def build_graph(self):
        graph = StateGraph(MessagesState)
        graph.add_node("n", lambda state: state)
        graph.add_edge(START, "n")
        return graph
"""


def write(path, text):
    path.write_text(textwrap.dedent(text))
    return str(path)


def test_one_name_is_one_agent():
    register("test-taken")(type("First", (BaseAgentGraph,), {}))
    with pytest.raises(AgentError, match="'test-taken' is registered twice"):
        register("test-taken")(type("Second", (BaseAgentGraph,), {}))


def test_an_unknown_agent_lists_the_known_and_the_nearest():
    import_modules(["chatlearn.models.agent.examples"])
    with pytest.raises(AgentError, match=r"registered: .*calculator.*Did you mean 'calculator'"):
        agent_class("calculater")


def test_user_files_are_imported_by_path_and_may_be_imported_twice(tmp_path):
    path = write(tmp_path / "my_agent_file.py", AGENT.format(name="test-by-path"))
    import_modules([path])
    import_modules([path])
    assert agent_class("test-by-path").__name__ == "Mine"


def test_a_module_of_the_current_folder_is_imported_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "my_agent_module.py", AGENT.format(name="test-by-name"))
    import_modules(["my_agent_module"])
    assert agent_class("test-by-name").__name__ == "Mine"


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("no/such/file.py", ConfigError, "there is no file"),
        ("no_such_module", ConfigError, "there is no module 'no_such_module'"),
    ],
)
def test_modules_that_are_not_there(name, error, said):
    with pytest.raises(error, match=said):
        import_modules([name])


def test_an_error_while_importing_shows_the_users_line(tmp_path):
    path = write(tmp_path / "broken_agent.py", "x = 1\ny = x / 0\n")
    with pytest.raises(AgentError, match=r"(?s)ZeroDivisionError.*y = x / 0"):
        import_modules([path])


def make(llm, tokenizer, agent, cfg=None):
    name = f"test-{agent.__qualname__}"
    register(name)(agent)
    return AgentFactory(llm, tokenizer).agent(name, cfg)


class Plain(BaseAgentGraph):
    def build_graph(self):
        graph = StateGraph(MessagesState)
        graph.add_node("n", lambda state: state)
        graph.add_edge(START, "n")
        return graph


class Typed(Plain):
    from pydantic import BaseModel

    class Config(BaseModel):
        max_turns: int = 3


def test_the_yaml_is_read_as_attributes(llm, tokenizer, tmp_path):
    yaml = write(tmp_path / "a.yaml", "max_turns: 4\ntool:\n  timeout_s: 2.5\nreward_fn: m:f\n")
    agent, reward_fn = make(llm, tokenizer, Plain, yaml)
    assert agent.cfg.max_turns == 4
    assert agent.cfg.tool.timeout_s == 2.5
    assert reward_fn == "m:f"
    with pytest.raises(AttributeError, match=r"no key 'max_turn' in .*a.yaml; it has: 'max_turns'"):
        _ = agent.cfg.max_turn


def test_a_typed_cfg_has_defaults_and_refuses_what_it_does_not_know(llm, tokenizer, tmp_path):
    agent, _ = make(llm, tokenizer, Typed)
    assert agent.cfg.max_turns == 3
    yaml = write(tmp_path / "b.yaml", "max_turn: 4\n")
    with pytest.raises(AgentError, match=r"no key 'max_turn' in .*did you mean 'max_turns'"):
        make(llm, tokenizer, Typed, yaml)
    yaml = write(tmp_path / "c.yaml", "max_turns: many\n")
    with pytest.raises(AgentError, match=r"(?s)does not fit Typed.Config.*max_turns"):
        make(llm, tokenizer, Typed, yaml)


def test_graphs_are_cached_by_name_and_yaml(llm, tokenizer, tmp_path):
    register("test-cached")(Plain)
    factory = AgentFactory(llm, tokenizer)
    one = write(tmp_path / "one.yaml", "a: 1")
    two = write(tmp_path / "two.yaml", "a: 2")
    assert factory.agent("test-cached", one)[0] is factory.agent("test-cached", one)[0]
    assert factory.agent("test-cached", two)[0].cfg.a == 2


class BuildsAString(BaseAgentGraph):
    def build_graph(self):
        return "graph"


class BuildsBadly(BaseAgentGraph):
    def build_graph(self):
        raise RuntimeError("no tools today")


@pytest.mark.parametrize(
    ("agent", "said"),
    [
        (BuildsAString, "returned str; it must return a langgraph StateGraph"),
        (BuildsBadly, r"(?s)building agent .* raised RuntimeError: no tools today"),
    ],
)
def test_a_graph_that_cannot_be_built(llm, tokenizer, agent, said):
    with pytest.raises(AgentError, match=said):
        make(llm, tokenizer, agent)
