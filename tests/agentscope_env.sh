#!/usr/bin/env bash
# Makes, or finds, a folder with AgentScope 1.0.21 beside the packages that are installed (about 30 s).
#
#   bash tests/agentscope_env.sh       the last line of its output is the folder, for PYTHONPATH
#
# It lives in ${CHATLEARN_CACHE:-~/.cache/chatlearn}, outside the checkout, and is made anew when this
# file changes. PYTHON=... is the interpreter that will read it, and has chatlearn's packages already.
# AgentScope 1.x reads streams only of openai<2, so the folder brings one that goes before a newer one.
set -euo pipefail

say() { echo "agentscope_env: $*" >&2; }

base=$(command -v "${PYTHON:-python3}")
version=$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
cache=${CHATLEARN_CACHE:-$HOME/.cache/chatlearn}
folder=$cache/agentscope-py$version
stamp=$folder/chatlearn.stamp
recipe=$(sha256sum "${BASH_SOURCE[0]}" | cut -d' ' -f1)

mkdir -p "$cache"
exec 9>"$folder.lock"
flock 9 # a second one waits here, and then finds the work done

if [[ "$(cat "$stamp" 2>/dev/null)" != "$recipe" ]]; then
  say "making $folder"
  rm -rf "$folder"
  # Without --no-deps pip would bring another torch, pydantic and protobuf. What follows is what
  # AgentScope's imports need beyond chatlearn's own packages.
  "$base" -m pip install -qq --disable-pip-version-check --root-user-action=ignore \
    --no-deps --target "$folder" \
    agentscope==1.0.21 'openai==1.109.1' 'mcp==1.30.0' anthropic==2.12.0 dashscope==2.0.2 \
    aioitertools docstring_parser filetype json5 json_repair python-datauri cached-property \
    opentelemetry-api opentelemetry-sdk opentelemetry-semantic-conventions \
    opentelemetry-exporter-otlp opentelemetry-exporter-otlp-proto-http \
    opentelemetry-exporter-otlp-proto-grpc opentelemetry-exporter-otlp-proto-common \
    opentelemetry-exporter-http-transport opentelemetry-proto googleapis-common-protos \
    protobuf grpcio python-socketio python-engineio bidict simple-websocket wsproto shortuuid tiktoken \
    sounddevice sqlalchemy greenlet python-frontmatter aiofiles pydantic-settings python-dotenv \
    python-multipart sse-starlette httpx-sse httpx httpcore h11 anyio sniffio pyjwt websocket-client \
    jiter distro requests urllib3 charset-normalizer idna certifi jsonschema cffi pycparser \
    cryptography loguru >&2
  echo "$recipe" >"$stamp"
fi
say "ready: $folder"
echo "$folder"
