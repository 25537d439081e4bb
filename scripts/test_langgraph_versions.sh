#!/usr/bin/env bash
# Runs tests/conformance and the laws in tests/models/agent on the oldest supported langgraph and
# langchain-core, and on one between.
# Each line is put into a folder in front of the installed packages; nothing is replaced and torch is
# not installed again. The folders are kept in $CHATLEARN_CACHE (default ~/.cache/chatlearn).
#
#   scripts/test_langgraph_versions.sh            both lines: 15 s, 45 s the first time, two cores
#   scripts/test_langgraph_versions.sh 0.6        one line
#   scripts/test_langgraph_versions.sh --table    both, the installed one too, and the table in
#                                                 docs/langgraph.md written anew
set -euo pipefail
cd "$(dirname "$0")/.."
[[ -v PYTHON ]] || source scripts/setup_env.sh
export OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
python=${PYTHON:-python}
cache=${CHATLEARN_CACHE:-$HOME/.cache/chatlearn}

declare -A pins=(
  [0.6]="langgraph==0.6.0 langgraph-prebuilt==0.6.0 langgraph-checkpoint==2.1.0 langgraph-sdk==0.2.0
    langgraph-checkpoint-sqlite==2.0.11 aiosqlite==0.20.0 langchain-core==0.3.72 langsmith==0.4.0
    langchain==0.3.27 langchain-text-splitters==0.3.9"
  [1.0]="langgraph==1.0.2 langgraph-prebuilt==1.0.2 langgraph-checkpoint==3.0.0 langgraph-sdk==0.2.9
    langgraph-checkpoint-sqlite==3.0.0 aiosqlite==0.20.0 langchain-core==1.1.0 langsmith==0.4.0
    langchain==1.1.0"
)

# The folder of a line, installed if it is not there yet.
folder() {
  local key
  key=$(printf '%s' "${pins[$1]}" | sha256sum | cut -c1-12)
  local at="$cache/langgraph-$1-$key-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
  if [[ ! -d $at ]]; then
    mkdir -p "$cache"
    local new="$at.$$"
    # shellcheck disable=SC2086
    "$python" -m pip install -q --disable-pip-version-check --no-deps --target "$new" ${pins[$1]} >&2
    touch "$new/langgraph/__init__.py" # no part of the installed langgraph is mixed in
    mv "$new" "$at"
  fi
  echo "$at"
}

lines=()
write_table=0
for argument in "$@"; do
  if [[ $argument == --table ]]; then
    write_table=1
  elif [[ -v pins[$argument] ]]; then
    lines+=("$argument")
  else
    echo "no line $argument; known: ${!pins[*]} --table" >&2
    exit 2
  fi
done
[[ ${#lines[@]} -gt 0 ]] || lines=(0.6 1.0)

tables=$(mktemp -d)
trap 'rm -rf "$tables"' EXIT
for line in "${lines[@]}"; do
  at=$(folder "$line")
  echo "langgraph $line"
  PYTHONPATH="$at:$PWD" "$python" -m pytest tests/conformance --conformance-table="$tables/$line.json" \
    --deselect tests/conformance/test_table.py
  PYTHONPATH="$at:$PWD" "$python" -m pytest \
    tests/models/agent/test_{attempts,nodes,token_law,agent_run,chatlearn_compat}.py
done
if [[ $write_table == 1 ]]; then
  "$python" -m pytest tests/conformance --conformance-table="$tables/installed.json" \
    --deselect tests/conformance/test_table.py
  "$python" tests/conformance/table.py "$tables"/*.json
fi
