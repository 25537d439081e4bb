"""Who scores a task, and what is said when the named function cannot be had."""

import pickle
import sys

import pytest

from chatlearn.errors import ConfigError
from chatlearn.rewards import BUILT_IN, lookup, registry, resolve_reward, reward
from chatlearn.types import Task

SOURCE = """
from chatlearn.rewards import reward

LOADS = []
NOT_A_FUNCTION = 3

@reward("file/source")
def always(**_):
    return 1.0

def never(response):
    return 0.0
"""


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_functions", dict(registry._functions))


@pytest.fixture
def judge_file(tmp_path):
    path = tmp_path / "my judge.py"
    path.write_text(SOURCE)
    return path


def task(data_source="nobody", **fields):
    return Task("d:0", [], "calculator", None, data_source, "1", fields)


def test_the_built_in_rewards_are_registered():
    math, gsm8k, arithmetic = BUILT_IN
    for source in ("DigitalLearningGmbH/MATH-lighteval", "HuggingFaceH4/MATH-500", "aime24"):
        assert lookup(source) is math
    assert lookup("openai/gsm8k") is gsm8k
    assert lookup("chatlearn/arithmetic") is arithmetic


def test_one_function_may_serve_several_sources_and_stays_as_it_was():
    @reward("a", "b")
    def mine(response):
        return len(response)

    assert lookup("a") is lookup("b") is mine
    assert mine("four") == 4


def test_a_source_has_one_reward():
    @reward("a")
    def first():
        return 0.0

    with pytest.raises(ConfigError, match=r"'a': .*first and .*second; .*reward_fn"):

        @reward("new", "a")
        def second():
            return 1.0

    assert lookup("a") is first
    assert lookup("new") is None, "a refused registration leaves nothing behind"


@pytest.mark.parametrize("sources", [(), (3,), ("",), (len,)])
def test_a_reward_needs_names(sources):
    with pytest.raises(ConfigError, match='@reward\\("my/data"\\)'):
        reward(*sources)


def test_the_row_wins_over_the_agent_over_the_registry(judge_file):
    @reward("mine")
    def registered():
        return 0.5

    always, never = f"{judge_file}:always", f"{judge_file}:never"
    assert resolve_reward(task("mine", reward_fn=always), never).__name__ == "always"
    assert resolve_reward(task("mine"), never).__name__ == "never"
    assert resolve_reward(task("mine", reward_fn=None), None) is registered
    assert resolve_reward(task("mine", reward_fn=""), "") is registered
    assert resolve_reward(task("nobody"), None) is None


def test_a_function_of_an_installed_module():
    found = resolve_reward(task(), "chatlearn.rewards.math:gsm8k_reward")
    assert found is lookup("openai/gsm8k")


def test_a_file_is_imported_once_and_its_functions_pickle(judge_file, monkeypatch):
    first = resolve_reward(task(), f"{judge_file}:always")
    monkeypatch.chdir(judge_file.parent)
    assert resolve_reward(task(), "my judge.py:always") is first, "the same file, another spelling"
    assert pickle.loads(pickle.dumps(first)) is first
    assert lookup("file/source") is first


def test_a_file_imported_under_a_second_name_may_register_again(judge_file):
    resolve_reward(task(), f"{judge_file}:always")
    namespace = {"__name__": "imported_by_import_modules"}
    exec(compile(SOURCE, str(judge_file), "exec"), namespace)
    assert lookup("file/source") is namespace["always"]


def test_the_same_name_in_another_file_is_another_function(tmp_path, judge_file):
    other = tmp_path / "other.py"
    other.write_text(SOURCE)
    resolve_reward(task(), f"{judge_file}:always")
    with pytest.raises(ConfigError, match="file/source"):
        resolve_reward(task(), f"{other}:always")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_colon", "'no_colon'; write 'pkg.mod:function' or 'path/file.py:function'"),
        (":f", "write 'pkg.mod:function'"),
        ("pkg:", "write 'pkg.mod:function'"),
        (5, "is 5; write 'pkg.mod:function'"),
        ("chatlearn.rewards.maths:f", "no module 'chatlearn.rewards.maths'; did you mean .*math'"),
        ("chatlearnn.rewards:f", "no module 'chatlearnn'; did you mean 'chatlearn'"),
        ("chatlearn.rewards.math:gsm8k", "no 'gsm8k'; did you mean 'gsm8k_reward'"),
        ("chatlearn.rewards.math:MAX_ANSWER_CHARS", "is int, not a function"),
        ("{folder}/my_judge.py:f", "there is no file .*my_judge.py; did you mean 'my judge.py'"),
        ("{folder}/my judge.py:alway", "no 'alway'; did you mean 'always'"),
        ("{folder}/my judge.py:NOT_A_FUNCTION", "is int, not a function"),
        ("{folder}/broken.py:f", r"importing .*broken\.py raised ZeroDivisionError[\s\S]*line 1"),
        ("{folder}/needs.py:f", r"importing .* raised ModuleNotFoundError: .*'not_installed'"),
    ],
)
def test_what_cannot_be_had_is_said_with_the_nearest_name(judge_file, spec, message):
    folder = judge_file.parent
    (folder / "broken.py").write_text("1 / 0\n")
    (folder / "needs.py").write_text("import not_installed\n")
    spec = spec.format(folder=folder) if isinstance(spec, str) else spec
    with pytest.raises(ConfigError, match=message) as error:
        resolve_reward(task(), spec)
    assert str(error.value).startswith("reward_fn in the YAML of agent 'calculator'")
    with pytest.raises(ConfigError, match=r"^reward_fn of row d:0"):
        resolve_reward(task(reward_fn=spec), None)


def test_a_module_that_needs_a_missing_one_is_not_called_unknown(tmp_path, monkeypatch):
    (tmp_path / "judge_with_needs.py").write_text("import not_installed\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"raised ModuleNotFoundError: .*not_installed"):
        resolve_reward(task(), "judge_with_needs:f")


def test_a_file_that_failed_is_tried_again_after_it_was_mended(tmp_path):
    path = tmp_path / "mended.py"
    path.write_text("1 / 0\n")
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        resolve_reward(task(), f"{path}:f")
    assert not any("mended" in name for name in sys.modules)
    path.write_text("def f():\n    return 1.0  # longer than before\n")
    assert resolve_reward(task(), f"{path}:f")() == 1.0
