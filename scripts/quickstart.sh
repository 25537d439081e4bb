#!/usr/bin/env bash
# From a fresh clone to a trained LangGraph agent, on a CPU and without any model hub.
#
#   bash scripts/quickstart.sh [tiny|smollm2] [key=value ...]
#
# tiny      a 0.44M-parameter policy learns to rely on its calculator. One to two minutes of training
#           after one of warm start; 1 GB of memory.
# smollm2   SmolLM2-135M learns one-digit arithmetic, with a second try after a wrong answer. Some 7
#           minutes of training; 8 GB of memory.
# Both on two cores; the first run also installs the environment (1 to 3 minutes). key=value
# overrides any key of template/local_cpu.yaml. Run again, it continues an unfinished run of the
# same name, or starts a new one: environment, data and model are kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
policy=tiny
case ${1:-} in
    tiny | smollm2) policy=$1 && shift ;;
    *=* | --* | "") ;;
    *) echo "quickstart: '$1' is neither tiny, smollm2 nor key=value" >&2 && exit 2 ;;
esac
source scripts/setup_env.sh
export HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE  # spinning threads would fight over busy cores

model=pretrained_models/$policy
if [[ $policy == tiny ]]; then
    data=dataset/arithmetic
    data_options=(--kind two_digit)
    settings=(
        runtime_args.exp_name=quickstart
        runtime_args.num_episode=100
        runtime_args.eval_episode_interval=20
        models.policy.eval_temperature=1
        models.policy.max_prompt_tokens_length=64
        models.policy.max_response_tokens_length=96
        models.policy.max_seq_len=256
        models.policy_trainer.optimizer.lr=5e-4
    )
else
    data=dataset/arithmetic_one_digit
    data_options=(--kind one_digit --agent_name second_try
        --agent_cfg_path template/agent/second_try.yaml
        --prompt_template "What is {expression}? Reply with the number only.")
    settings=(
        runtime_args.exp_name=quickstart_smollm2
        runtime_args.num_episode=20
        runtime_args.eval_episode_interval=5
        models.policy.temperature=0.8 # at 1 an untrained model of this size mostly rambles
        models.policy.eval_temperature=0.8
        models.policy.max_prompt_tokens_length=64
        models.policy.max_response_tokens_length=48
        models.policy.max_tokens_per_turn=24
        models.policy.max_seq_len=192
        models.policy_trainer.optimizer.lr=3e-5
        models.policy_trainer.precision=bf16
    )
fi
[[ -f $data/train_agent.json && -f $data/test_agent.json ]] ||
    python chatlearn/data/data_preprocess/arithmetic_agent.py --local_dir "$data" "${data_options[@]}"
if [[ $policy == tiny ]]; then
    python scripts/tiny_model.py --out "$model" --exclude "$data/test_agent.json"
else
    python scripts/smollm2_model.py --out "$model"
fi

exec chatlearn grpo --config-file template/local_cpu.yaml \
    runtime_args.data_path="$data/train_agent.json" \
    runtime_args.eval_data_path="$data/test_agent.json" \
    runtime_args.enable_eval_before_training=True \
    models.policy.eval_top_p=1 \
    models.policy_trainer.load="$model" \
    "${settings[@]}" "$@"
