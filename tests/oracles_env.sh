#!/usr/bin/env bash
# Makes, or finds, a folder with verl and TRL beside the packages that are installed (about 30 s).
#
#   bash tests/oracles_env.sh       the last line of its output is the folder, for PYTHONPATH
#
# It lives in ${CHATLEARN_CACHE:-~/.cache/chatlearn}, outside the checkout, and is made anew when this
# file changes. PYTHON=... is the interpreter that will read it, and must have torch, transformers,
# accelerate and ray already: nothing here brings them.
set -euo pipefail

say() { echo "oracles_env: $*" >&2; }

base=$(command -v "${PYTHON:-python3}")
version=$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
cache=${CHATLEARN_CACHE:-$HOME/.cache/chatlearn}
folder=$cache/oracles-py$version
stamp=$folder/chatlearn.stamp
recipe=$(sha256sum "${BASH_SOURCE[0]}" | cut -d' ' -f1)

mkdir -p "$cache"
exec 9>"$folder.lock"
flock 9 # a second one waits here, and then finds the work done

if [[ "$(cat "$stamp" 2>/dev/null)" != "$recipe" ]]; then
  say "making $folder"
  rm -rf "$folder"
  pip() {
    "$base" -m pip install -qq --disable-pip-version-check --root-user-action=ignore \
      --no-deps --upgrade --target "$folder" "$@" >&2
  }
  # Without --no-deps they would bring another torch. What follows them is what their imports need.
  pip verl==0.9.1 trl==1.16.0 tensordict==0.15.3 datasets==5.2.0 omegaconf pyvers orjson \
    importlib_metadata zipp cloudpickle codetiming pandas python-dateutil pytz tzdata six \
    multiprocess dill xxhash fsspec hydra-core peft torchdata antlr4-python3-runtime==4.9.3
  echo "$recipe" >"$stamp"
fi
say "ready: $folder"
echo "$folder"
