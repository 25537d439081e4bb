#!/usr/bin/env bash
# Lint, format check and the default tests; arguments go to pytest: `bash scripts/test.sh -k packing`.
# Needs no GPU, and no network once the environment is set up.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh
export HF_HUB_OFFLINE=1

ruff check . && ruff format --check . && exec python -m pytest "$@"
