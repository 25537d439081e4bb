#!/usr/bin/env bash
# Lint, format check and the default tests; arguments go to pytest: `bash scripts/test.sh -k packing`.
# Needs no GPU, and no network once the environment is set up.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh
# The tests read TRL's chat templates. It is never imported, so it comes without what it depends on.
missing='import sys; from importlib.util import find_spec
sys.exit(find_spec("trl") is None and sys.version_info >= (3, 11))'
python -c "$missing" || python -m pip install --quiet --disable-pip-version-check --no-deps trl==1.16.0
export HF_HUB_OFFLINE=1

ruff check . && ruff format --check . && exec python -m pytest "$@"
