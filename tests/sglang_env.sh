#!/usr/bin/env bash
# Makes, or finds, a Python that serves with SGLang on a machine without a GPU (about 80 s, 2.1 GB).
#
#   bash tests/sglang_env.sh        the last line of its output is the path of that Python
#
# It lives in ${CHATLEARN_CACHE:-~/.cache/chatlearn}, outside the checkout, and is made anew when this
# file or tests/sglang_cpu/ changes. SGLANG_PYTHON=... names one that exists already. PYTHON=... is
# the interpreter to make it from.
set -euo pipefail

say() { echo "sglang_env: $*" >&2; }

if [[ -n "${SGLANG_PYTHON:-}" ]]; then
  if "$SGLANG_PYTHON" -I -c 'import importlib.metadata as m; m.version("sglang")' 2>/dev/null; then
    echo "$SGLANG_PYTHON"
    exit 0
  fi
  say "SGLANG_PYTHON=$SGLANG_PYTHON has no sglang; unset it, or install sglang==0.5.23 there"
  exit 1
fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
base=$(command -v "${PYTHON:-python3}")
version=$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
cache=${CHATLEARN_CACHE:-$HOME/.cache/chatlearn}
venv=$cache/sglang-0.5.23-cpu-py$version
stamp=$venv/chatlearn.stamp
recipe=$(cd "$here" && { cat sglang_env.sh && find sglang_cpu -type f -not -name '*.pyc' | sort | xargs cat; } | sha256sum | cut -d' ' -f1)

mkdir -p "$cache"
exec 9>"$venv.lock"
flock 9 # a second one waits here, and then finds the work done

if [[ "$(cat "$stamp" 2>/dev/null)" != "$recipe" ]]; then
  say "making $venv"
  rm -rf "$venv" # half made by one that was interrupted, or by an older recipe
  "$base" -m venv "$venv"
  pip() { "$venv/bin/python" -m pip install -qq --disable-pip-version-check "$@" >&2; }
  say "torch"
  # PyPI's own build for Linux brings CUDA; the CPU one is on PyTorch's index, or wherever pip looks
  pip torch==2.13.0+cpu || pip torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
  say "what SGLang imports"
  # Each was added because an import failed without it. triton 3.4.0, because later ones are twice
  # as large and all that is needed of it is that it can be imported.
  pip torch==2.13.0 transformers==5.19.0 triton==3.4.0 aiohttp apache-tvm-ffi==0.1.11 \
    compressed-tensors==0.18.0 dill einops fastapi gguf IPython jsonschema msgspec openai==2.8.0 \
    orjson partial_json_parser pillow psutil pybase64 python-multipart pyzmq requests \
    sentencepiece==0.2.1 setproctitle soundfile==0.13.1 'uvicorn>=0.51' uvloop
  say "SGLang"
  # Without --no-deps they would bring another torch and several GB of CUDA.
  pip --no-deps sglang==0.5.23 xgrammar==0.2.7 torchvision==0.28.0
  say "the shims of tests/sglang_cpu"
  site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  cp -r "$here"/sglang_cpu/sgl_kernel "$here"/sglang_cpu/*.py "$here"/sglang_cpu/*.pth "$site"
  shims=$site/chatlearn_sglang_cpu-1.dist-info
  mkdir "$shims"
  printf 'Metadata-Version: 2.1\nName: chatlearn-sglang-cpu\nVersion: 1\n' >"$shims/METADATA"
  cp "$here/sglang_cpu/entry_points.txt" "$shims"
  find "$site" -name __pycache__ -path "*sgl_kernel*" -prune -exec rm -rf {} +
  say "a first import"
  SGLANG_USE_CPU_ENGINE=1 "$venv/bin/python" -c 'import sglang.srt.entrypoints.http_server' >&2
  echo "$recipe" >"$stamp"
fi
say "ready: $venv"
echo "$venv/bin/python"
