"""Where values come from, and that whatever is refused says the key, the value and the remedy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from chatlearn.config import dump_config, load_config
from chatlearn.config.yaml_file import dump_yaml, parse_yaml, read_yaml
from chatlearn.errors import ConfigError

TEMPLATES = sorted((Path(__file__).parents[2] / "template").glob("*.yaml"))
GRPO_FSDP = Path(__file__).parents[2] / "template" / "grpo_fsdp.yaml"
REQUIRED = ["runtime_args.data_path=train.json", "models.policy_trainer.load=some/model"]


def refused(*overrides: str, path: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, [*REQUIRED, *overrides])
    return str(caught.value)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_every_template_needs_two_keys_more(template: Path) -> None:
    assert load_config(template, REQUIRED).runtime_args.data_files == ["train.json"]
    with pytest.raises(ConfigError, match=r"data_path: is not set(.|\n)*trainer\.load: is not set"):
        load_config(template, [])


def test_there_are_templates() -> None:
    assert {"local_cpu.yaml", "grpo_fsdp.yaml"} <= {path.name for path in TEMPLATES}


def test_the_cluster_template_is_what_chatlearn_users_expect() -> None:
    config = load_config(GRPO_FSDP, REQUIRED)
    run, policy, trainer = config.runtime_args, config.models.policy, config.models.policy_trainer
    assert (run.cluster, run.rollout_backend, run.train_backend) == ("ray", "sglang", "fsdp")
    assert run.colocation == ("policy", "policy_trainer", "ref_policy")
    assert (policy.num_gpu, policy.num_engine, trainer.num_gpu, trainer.num_rank) == (8, 8, 8, 8)
    assert (run.sample_per_episode, run.steps_per_episode, config.prompts_per_episode) == (
        (2048, 1, 64)
    )
    assert config.publish_method == "tensor"


def test_the_cluster_template_goes_without_gpus_and_apart() -> None:
    """The reference follows the trainer, so two keys are enough either way."""
    no_gpu = ["models.policy.num_gpu=0", "models.policy_trainer.num_gpu=0"]
    config = load_config(GRPO_FSDP, [*REQUIRED, *no_gpu, "models.policy_trainer.kl_coef=0.1"])
    assert (config.models.policy.num_engine, config.models.policy_trainer.num_rank) == (1, 1)
    assert config.models.ref_policy.num_gpu == 0
    apart = ["models.policy.num_gpu=6", "models.policy_trainer.num_gpu=2"]
    config = load_config(GRPO_FSDP, [*REQUIRED, *apart, "runtime_args.colocation=[]"])
    assert (config.is_colocated, config.publish_method) == (False, "collective")


@pytest.mark.parametrize(
    "spelling",
    [
        "models.policy.sglang_args={attention_backend: fa3, log_requests: true}",
        "models.policy={sglang_args: {attention_backend: fa3, log_requests: true}}",
    ],
)
def test_flags_of_the_server_are_one_value(spelling: str, tmp_path: Path) -> None:
    """A mapping that is a value, among mappings that are sections."""
    flags = {"attention_backend": "fa3", "log_requests": True}
    config = load_config(GRPO_FSDP, [*REQUIRED, spelling])
    assert dict(config.models.policy.sglang_args) == flags
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    assert load_config(file, []) == config
    assert "sglang_args" in refused("models.policy.sglang_args={attention_backend: [fa3]}")


def test_defaults_then_file_then_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("runtime_args: {seed: 1, num_episode: 7}\nmodels:\n  policy:\n  # all off\n")
    config = load_config(file, [*REQUIRED, "runtime_args.seed=2", "runtime_args.seed=3"])
    run = config.runtime_args
    assert (run.seed, run.num_episode, run.sample_per_episode) == (3, 7, 64)


def test_values_have_the_type_they_are_spelled_with() -> None:
    config = load_config(
        None,
        [
            *REQUIRED,
            "models.policy_trainer.optimizer.lr=2e-6",
            "models.policy_trainer.kl_coef=1",
            "runtime_args.train_global_batch_size=32",
            "runtime_args.data_shuffle=false",
            "runtime_args.max_checkpoints=null",
            "runtime_args.import_modules=[a.b, c/d.py]",
            "runtime_args.exp_name=2026-01-02",
            "models.policy={temperature: 0.5, top_k: 5}",
        ],
    )
    run, trainer = config.runtime_args, config.models.policy_trainer
    assert trainer.optimizer.lr == 2e-6
    assert isinstance(trainer.kl_coef, float)
    assert run.train_global_batch_size == 32
    assert run.data_shuffle is False
    assert run.max_checkpoints is None
    assert run.import_modules == ("a.b", "c/d.py")
    assert run.exp_name == "2026-01-02"
    assert (config.models.policy.temperature, config.models.policy.top_k) == (0.5, 5)


def test_references_are_resolved_after_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "runtime_args:\n"
        "  exp_name: first\n"
        "  output_dir: out/${runtime_args.exp_name}-${runtime_args.seed}\n"
        "  train_global_batch_size: ${runtime_args.sample_per_episode}\n"
        "  import_modules: ['${runtime_args.exp_name}.agent']\n"
        "models: {policy: {max_seq_len: '${models.policy_trainer.max_token_in_packing}'}}\n"
    )
    config = load_config(file, [*REQUIRED, "runtime_args.exp_name=second"])
    run = config.runtime_args
    assert run.output_dir == "out/second-1234"  # embedded: text
    assert run.train_global_batch_size == 64  # whole: keeps its type, here of a default
    assert run.import_modules == ("second.agent",)
    assert config.models.policy.max_seq_len == 8192


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_a_dumped_configuration_loads_equal(template: Path, tmp_path: Path) -> None:
    config = load_config(
        template,
        [*REQUIRED, "runtime_args.exp_name='1e5'", "runtime_args.log_args_dict.wandb_id='on'"],
    )
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    assert load_config(file, []) == config


BAD_OVERRIDES = [
    # unknown keys: a slip among siblings, the leaf elsewhere, a wrong section
    (
        "models.policy.tmeperature=1",
        "models.policy.tmeperature = 1:",
        "`models.policy.temperature`",
    ),
    ("temperature=1", "temperature = 1:", "did you mean `models.policy.temperature`"),
    ("models.policy.lr=1", "models.policy.lr = 1:", "`models.policy_trainer.optimizer.lr`"),
    ("model.policy.top_p=1", "model.policy.top_p", "`models.policy.top_p`"),
    ("models.policy_trainer.laod=m", "did you mean `models.policy_trainer.load`"),
    ("models.polcy_trainer.laod=m", "did you mean `models.policy_trainer.load`"),
    ("models.policy_trainer.optimizer.foo=1", "holds lr, min_lr, lr_schedule"),
    ("foo=1", "foo = 1: unknown key", "holds runtime_args, models"),
    ("models.policy.top_p.x=1", "models.policy.top_p.x = 1", "no keys below it"),
    ("models.policy=3", "models.policy = 3: is a section", "models.policy.load=…"),
    # ChatLearn's keys that are not here
    ("runtime_args.num_inference_per_prompt=8", "set models.policy.num_inference_per_prompt"),
    ("runtime_args.concurrent_setup=true", "placement follows", "leave it out"),
    ("models.policy.packing=true", "max_token_in_packing"),
    ("models.policy.free_gpu_memory.offload_weights=true", "leave it out"),
    ("models.ref_policy.num_cpu=2", "placement follows", "leave it out"),
    (
        "models.rollout_manager.max_concurrent_per_engine=192",
        "set models.policy.max_concurrent_requests",
    ),
    ("models.rollout_manager.use_dynamic_load_blance=true", "the least to do", "leave it out"),
    ("models.policy_trainer.bf16=true", "set models.policy_trainer.precision"),
    ("models.policy_trainer.use_expandable_segments=true", "PYTORCH_CUDA_ALLOC_CONF"),
    ("models.reward.num_cpu=2", "leave the section out"),
    ("env_args.pip=[]", "env_args.pip = []", "leave the section out"),
    ("env_args.working_dir=.", 'env_args.working_dir = "."', "set runtime_args.working_dir"),
    # spelled wrongly
    ("runtime_args.seed", "runtime_args.seed: has no '='", "key=value"),
    ("runtime_args.seed=", "runtime_args.seed=: has no value", "null"),
    ("=3", "names no key"),
    ("runtime_args.data_path=[a", "runtime_args.data_path=[a, line 1, column 3", "not valid YAML"),
    ("runtime_args.num_episode='50'", 'num_episode = "50":', "whole number, without quotes"),
    ("runtime_args.num_episode=2.5", "num_episode = 2.5:", "whole number"),
    ("runtime_args.seed=true", "seed = true:", "whole number"),
    ("runtime_args.seed=null", "seed = null:", "leave runtime_args.seed out"),
    ("runtime_args.data_shuffle=1", "data_shuffle = 1:", "true or false"),
    ("runtime_args.exp_name=12", "exp_name = 12:", "exp_name='\"…\"'"),
    ("runtime_args.import_modules=a.b", 'import_modules = "a.b":', "import_modules='[one, two]'"),
    ("runtime_args.import_modules=[1]", "import_modules = [1]:", "must be text"),
    ("models.policy_trainer.optimizer.lr=.nan", "optimizer.lr = NaN:", "finite"),
    # references
    ("runtime_args.exp_name=${runtime_args.exp_nam}", "did you mean `runtime_args.exp_name`"),
    ("runtime_args.exp_name=${runtime_args.exp_name}", "refers to itself", "break the circle"),
    ("runtime_args.exp_name=x${models.policy.load}", "${models.policy.load}", "null and not text"),
]


@pytest.mark.parametrize("case", BAD_OVERRIDES, ids=lambda case: case[0])
def test_a_bad_override_is_refused_with_its_key_and_remedy(case: tuple[str, ...]) -> None:
    override, *pieces = case
    message = refused(override)
    assert "1 problem\n" in message
    for piece in pieces:
        assert piece in message


def test_a_circle_of_references_is_drawn() -> None:
    message = refused(
        "runtime_args.exp_name=${runtime_args.output_dir}",
        "runtime_args.output_dir=${runtime_args.exp_name}",
    )
    assert "runtime_args.exp_name -> runtime_args.output_dir -> runtime_args.exp_name" in message


def test_all_problems_come_at_once() -> None:
    """A missing key, an unknown one, a bad value and a contradiction of others: four lines."""
    with pytest.raises(ConfigError) as caught:
        load_config(
            None,
            [
                "models.policy_trainer.load=m",
                "temprature=1",
                "runtime_args.seed=x",
                "runtime_args.sample_per_episode=60",
            ],
        )
    header, *lines = str(caught.value).splitlines()
    assert header == "the configuration: 4 problems"
    for key in ("runtime_args.data_path:", "temprature", "runtime_args.seed", "sample_per_episode"):
        assert sum(key in line for line in lines) == 1


def test_a_refused_key_is_not_blamed_for_a_contradiction_too() -> None:
    """60 is no multiple of the default group of 8, but the group is what has to be mended."""
    message = refused(
        "runtime_args.sample_per_episode=60", "models.policy.num_inference_per_prompt=x"
    )
    assert "1 problem\n" in message


BAD_FILES = {
    "parse": ("runtime_args:\n  seed: [1\n", ["line 3, column 1", "not valid YAML"]),
    "tab": ("runtime_args:\n\tseed: 1\n", ["line 2, column 1", "not valid YAML"]),
    "twice": (
        "runtime_args:\n  seed: 1\n  seed: 2\n",
        ["line 3, column 3", "'seed' is written twice"],
    ),
    "dotted twice": (
        "runtime_args.seed: 1\nruntime_args: {seed: 2}\n",
        ["runtime_args.seed: is written twice"],
    ),
    "list": ("- 1\n", ["must be a mapping", "a list"]),
    "scalar section": ("models: 3\n", ["models = 3: is a section"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_with_the_place(name: str, tmp_path: Path) -> None:
    text, pieces = BAD_FILES[name]
    file = tmp_path / "run.yaml"
    file.write_text(text)
    message = refused(path=file)
    for piece in [str(file), *pieces]:
        assert piece in message


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    message = refused(path=tmp_path / "no.yaml")
    assert f"{tmp_path / 'no.yaml'}: no such file" in message
    assert "cannot be read" in refused(path=tmp_path)


def test_yaml_merges_are_not_repeated_keys(tmp_path: Path) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text("a: &a {x: 1}\nb: {c: &c {<<: *a, x: 2}}\nd: {<<: *c, y: 3}\n")
    assert read_yaml(file)["d"] == {"x": 2, "y": 3}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-6", 2e-6), ("1E5", 1e5), ("1.", 1.0), (".5", 0.5), ("-3", -3), ("1_000", 1000),
        ("12:30", "12:30"), ("012", "012"), ("2026-01-02", "2026-01-02"), ("1.2.3", "1.2.3"),
        ("e5", "e5"), ("no", False), ("~", None), ("0x10", 16), ("-", "-"),
    ],
)  # fmt: skip
def test_scalars(text: str, value: object) -> None:
    parsed = parse_yaml(f"[{text}]" if text != "-" else '["-"]', "test")[0]
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize("text", ["1e5", "no", "12:30", "2026-01-02", "012", "null", "a: b", "ü #"])
def test_dumped_text_stays_text(text: str) -> None:
    assert parse_yaml(dump_yaml({"x": text}), "test") == {"x": text}


def test_config_loads_no_heavy_library() -> None:
    code = (
        "import sys, chatlearn, chatlearn.config, chatlearn.config.plan, chatlearn.config.manual\n"
        "heavy = {'torch', 'ray', 'transformers', 'numpy', 'langgraph', 'langchain_core'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
