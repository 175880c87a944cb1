#!/usr/bin/env bash
# What only a machine with an NVIDIA GPU can check: laws first, then measurements, one JSON line per fact, in 8 minutes.
# Usage: bash tools/gpu_check.sh [--device cuda:0|cpu] [--parts machine,laws,...] [--out FILE]    (see tools/gpu_check.py)
# No network and no .venv: any Python 3.11 with torch, transformers, click, psutil, safetensors and rich; PYTHON=... chooses one.
# Exit codes: 0 all laws held, 1 one did not or a part failed, 3 torch finds no CUDA GPU.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
python=${PYTHON:-}
if [[ -z $python ]]; then
  python=python3
  [[ -x .venv/bin/python ]] && python=.venv/bin/python
fi
PYTHONPATH=$root exec "$python" tools/gpu_check.py "$@"
