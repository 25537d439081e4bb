#!/usr/bin/env bash
# The Python environment of this repository: made once, refreshed when pyproject.toml changes.
#
#   source scripts/setup_env.sh      # the other scripts; PATH then begins with the environment
#   bash scripts/setup_env.sh        # only make it
#
# Cost: about 1.5 GB of disk and 1 to 3 minutes the first time, nothing after that. Without an
# NVIDIA GPU the CPU build of torch is installed, which spares gigabytes of CUDA libraries.
# CHATLEARN_VENV    folder of the environment   (default: .venv in the repository)
# CHATLEARN_PYTHON  Python to build it with     (default: the first of 3.10 to 3.13 on PATH)

chatlearn_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CHATLEARN_VENV=${CHATLEARN_VENV:-$chatlearn_root/.venv}

chatlearn_setup() (
    set -uo pipefail # not -e: bash ignores it in a function whose result is tested, as below
    cd "$chatlearn_root" || exit 1
    torch=torch==2.13.0
    cpu_index=https://download.pytorch.org/whl/cpu
    pip=("$CHATLEARN_VENV/bin/python" -m pip --disable-pip-version-check)

    fail() {
        printf 'setup_env: %s\n' "$@" >&2
        exit 1
    }

    # Also asks for ensurepip: Debian ships a python3 that cannot make an environment without it.
    find_python() {
        local name fits='import ensurepip, sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))'
        for name in ${CHATLEARN_PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
            "$name" -c "$fits" 2>/dev/null && echo "$name" && return
        done
        fail "no Python from 3.10 to 3.13 with venv and ensurepip among:" \
            "    ${CHATLEARN_PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}" \
            "install one (Debian: apt install python3-venv) or set CHATLEARN_PYTHON to its path"
    }

    # What the environment depends on, as one line.
    fingerprint() {
        "$1" - "$gpu" "$chatlearn_root" <<'PY'
import hashlib, pathlib, sys
print(sys.version.split()[0], *sys.argv[1:], hashlib.sha256(pathlib.Path("pyproject.toml").read_bytes()).hexdigest())
PY
    }

    stage() {
        local words=$1 start=$SECONDS
        shift
        printf '  %-34s ' "$words"
        if "$@" >>"$log" 2>&1; then
            echo "$((SECONDS - start)) s"
        else
            echo "failed after $((SECONDS - start)) s; the end of $log:"
            tail -n 25 "$log" >&2
            fail "could not finish \"$words\"; run the script again once the cause is gone"
        fi
    }

    make_venv() {
        "$python" -m venv --clear "$CHATLEARN_VENV"
    }

    # An ordinary PyPI gives Linux a CUDA build; a mirror or a local wheel folder may give +cpu.
    install_cpu_torch() {
        local dry_run=(install --quiet --dry-run --no-deps --ignore-installed --report - "$torch")
        if [[ $(uname -s) != Linux || $("${pip[@]}" "${dry_run[@]}") == *'"version": "'*'+cpu"'* ]]; then
            "${pip[@]}" install "$torch"
        else
            "${pip[@]}" install --retries 1 --timeout 20 --index-url "$cpu_index" "$torch" ||
                "${pip[@]}" install "$torch"
        fi
    }

    gpu=cpu
    if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then gpu=cuda; fi
    stamp=$CHATLEARN_VENV/.chatlearn-setup
    if [[ -f $stamp && $(cat "$stamp") == "$(fingerprint "$CHATLEARN_VENV/bin/python")" ]]; then
        exit 0
    fi

    if [[ -e $CHATLEARN_VENV && ! -f $CHATLEARN_VENV/pyvenv.cfg ]]; then
        fail "$CHATLEARN_VENV exists and is not a virtual environment; set CHATLEARN_VENV"
    fi
    python=$(find_python) || exit 1
    log=$(mktemp "${TMPDIR:-/tmp}/chatlearn-setup.XXXXXX")
    echo "setting up $CHATLEARN_VENV with $("$python" --version) (log: $log)"
    rm -f "$stamp"
    # A half-made or older environment is kept and completed, unless its Python is another one.
    version='import sys; print(sys.version)'
    if [[ $("$CHATLEARN_VENV/bin/python" -c "$version" 2>/dev/null) != $("$python" -c "$version") ]]; then
        stage "virtual environment" make_venv
    fi
    [[ $gpu == cuda ]] || stage "torch, CPU build" install_cpu_torch
    stage "chatlearn with [gguf,dev]" "${pip[@]}" install -e '.[gguf,dev]'
    fingerprint "$CHATLEARN_VENV/bin/python" >"$stamp"
)

if ! chatlearn_setup; then
    return 1 2>/dev/null || exit 1
fi
export PATH="$CHATLEARN_VENV/bin:$PATH"
