#!/usr/bin/env bash
# The main job from nothing: set up, fetch a real model (93 MB, once), answer a question with most layers streamed.
# Usage: bash tools/demo.sh [option of offload-run generate]...        e.g. --json, --device cuda, -p "Why is the sky blue?"
# The answer goes to stdout, everything else to stderr.
set -euo pipefail

# The model is 269 MB: 57 MB of embedding and 30 layers of 7 MB. Within this budget most layers must stream.
device_memory=192MiB
prompt="What is gravity? Answer in two sentences."

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/tools/setup.sh"
"$root/.venv/bin/python" "$root/tools/fetch_demo_model.py" >/dev/null
exec "$root/.venv/bin/offload-run" generate demo -p "$prompt" --device-memory "$device_memory" -n 64 --temperature 0 "$@"
