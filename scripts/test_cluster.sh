#!/usr/bin/env bash
# The tests beside peers: real Ray, real SGLang on this machine's CPU, the losses of TRL and verl,
# agents written for AgentScope.
# Arguments go to pytest.
# Installs Ray into the environment of scripts/setup_env.sh, and SGLang into one of its own
# (tests/sglang_env.sh: 2 GB, kept in ~/.cache/chatlearn).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh
python -c 'import ray' 2>/dev/null || python -m pip install --quiet --disable-pip-version-check -e '.[ray]'
export HF_HUB_OFFLINE=1

exec python -m pytest -m 'ray or sglang or oracle or agentscope' "$@"
