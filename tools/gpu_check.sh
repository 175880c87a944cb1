#!/usr/bin/env bash
# What only a machine with an NVIDIA GPU can check: the tests of tests/gpu, then streaming speed into results/.
# Usage: bash tools/gpu_check.sh [option of pytest]...        Exit code 3: this machine has no CUDA GPU.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
bash tools/setup.sh
python=.venv/bin/python

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  printf 'gpu_check: torch finds no CUDA GPU on this machine, so nothing was checked\n' >&2
  exit 3
fi
if command -v nvidia-smi >/dev/null; then
  printf '== nvidia-smi\n'
  nvidia-smi || printf 'gpu_check: nvidia-smi failed; going on, torch does find a GPU\n' >&2
fi

printf '== pytest -m gpu tests/gpu\n'
"$python" -m pytest -m gpu tests/gpu -v "$@"

printf '== tools/bench_streaming.py on the demo model\n'
model=$("$python" tools/fetch_demo_model.py)
mkdir -p results
result=results/gpu_check_$(date -u +%Y%m%dT%H%M%SZ).json
"$python" tools/bench_streaming.py "$model" --json >"$result.partial"
mv "$result.partial" "$result"
printf 'written to %s\n' "$result"
