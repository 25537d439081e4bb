"""Names by which every process of a run finds the same workflow."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from chatlearn.errors import ConfigError
from chatlearn.tuner.naming import import_object, load_object, name_of, resolve_spec


@pytest.fixture
def imported(tmp_path, monkeypatch):
    """A module of the user's own: ``imported("text")`` writes and imports ``flow.py``."""

    def write(text):
        path = tmp_path / "flow.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location("flow", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "flow", module)
        spec.loader.exec_module(module)
        return module, path

    return write


def test_a_function_of_a_file_is_named_by_it(imported):
    module, path = imported("async def run(task, model): ...")

    spec = name_of(module.run)

    assert spec == f"{path}->run"
    assert load_object(spec, "here") is module.run
    again = import_object(spec, "here")  # as a worker does
    assert (again is not module.run, again.__name__) == (True, "run")


def test_a_function_of_a_package_is_named_by_its_module():
    from chatlearn.rewards.math import math_reward

    assert name_of(math_reward) == "chatlearn.rewards.math->math_reward"


def test_what_no_other_process_can_find_is_kept_in_this_one(imported):
    module, _ = imported("async def run(task, model): ...\nother = lambda task, model: ...")

    async def closure(task, model): ...

    for thing, name in [
        (closure, "test_what_no_other_process_can_find_is_kept_in_this_one.<locals>.closure"),
        (module.other, "<lambda>"),
    ]:
        spec = name_of(thing)
        assert spec == f"this process->{name}"
        assert load_object(spec, "here") is thing
        with pytest.raises(ConfigError, match=r"here is 'this process->.*cluster=local"):
            import_object(spec, "here")


def test_two_closures_of_one_name_are_two():
    def judge(reward):
        async def judged(task, response):
            return reward

        return judged

    first, second = judge(0.0), judge(1.0)
    name = "this process->test_two_closures_of_one_name_are_two.<locals>.judge.<locals>.judged"

    assert [name_of(first), name_of(second), name_of(first)] == [name, f"{name}#2", name]
    assert load_object(f"{name}#2", "here") is second


def test_a_renamed_function_is_not_named_by_a_name_that_leads_elsewhere(imported):
    module, _ = imported("async def run(task, model): ...\nfirst = run\nasync def run(a, b): ...")

    assert name_of(module.first) == "this process->run"


def test_a_file_imports_its_neighbours(tmp_path):
    (tmp_path / "neighbour_of_flow.py").write_text("VALUE = 3")
    (tmp_path / "flow2.py").write_text(
        "from neighbour_of_flow import VALUE\nasync def run(task, model): return VALUE"
    )
    assert load_object(f"{tmp_path}/flow2.py->run", "here").__globals__["VALUE"] == 3


def test_a_path_is_looked_up_in_folders(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "flow.py").write_text("")
    folders = (tmp_path / "a", tmp_path / "b")

    assert resolve_spec("flow.py->Run", *folders) == f"{tmp_path}/b/flow.py->Run"
    assert resolve_spec("other.py->Run", *folders) == "other.py->Run"
    assert resolve_spec("pkg.flow->Run", *folders) == "pkg.flow->Run"


def test_a_script_that_would_train_again_when_imported_is_refused(tmp_path):
    (tmp_path / "main.py").write_text(
        "from chatlearn.tuner import tune\n"
        "async def run(task, model): ...\n"
        "tune(run)\n"  # without `if __name__ == '__main__':`
    )
    with pytest.raises(ConfigError) as error:
        import_object(f"{tmp_path}/main.py->run", "here")
    assert "tune() was called while" in str(error.value)
    assert "put the call under  if __name__ == '__main__':" in str(error.value)


def test_importing_the_tuner_loads_no_torch():
    code = (
        "import sys, chatlearn.tuner; assert not {'torch', 'langgraph', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
