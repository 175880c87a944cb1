#!/usr/bin/env bash
# Make the environment in which `offload-run compare` runs DeepSpeed: torch, transformers and accelerate in the
# versions of tools/constraints.txt, DeepSpeed, and its reader for NVMe compiled against libaio.
# Usage: bash tools/setup_baselines.sh [FOLDER]
# FOLDER is where `compare` looks by itself unless given: ~/.local/share/offload-rt/baselines. Needs Python 3.11 or newer,
# a C++ compiler, and libaio's header (Debian: libaio-dev; where it is missing and apt-get is here, it is fetched into FOLDER).
# accelerate and transformers need none of this: they run in the environment of offload-run itself.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=${1:-${XDG_DATA_HOME:-$HOME/.local/share}/offload-rt/baselines}
venv=$folder/deepspeed
python=$venv/bin/python
deepspeed=${DEEPSPEED:-deepspeed==0.19.8}

say() { printf 'setup_baselines: %s\n' "$*" >&2; }

find_python() {
  local name
  for name in ${PYTHON:+"$PYTHON"} "$root/.venv/bin/python" python3 python3.13 python3.12 python3.11; do
    if "$name" -I -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      printf '%s\n' "$name"
      return
    fi
  done
  say "no Python 3.11 or newer found: install one, or set PYTHON to its path"
  exit 1
}

# libaio's header and library, from the system or unpacked beside the environment; nothing outside FOLDER is changed.
find_libaio() {
  if printf '#include <libaio.h>\nint main(){return 0;}\n' | cc -x c - -laio -o /dev/null 2>/dev/null; then
    return
  fi
  if [[ ! -e $venv/include/libaio.h ]]; then
    if ! command -v apt-get >/dev/null; then
      say "libaio.h is missing: install libaio's development package, then run this again"
      exit 1
    fi
    say "fetching libaio-dev into $folder"
    local work
    work=$(mktemp -d)
    (cd "$work" && apt-get download -qq libaio-dev libaio1 2>/dev/null || apt-get download -qq libaio-dev libaio1t64)
    for package in "$work"/*.deb; do
      dpkg-deb -x "$package" "$work/unpacked"
    done
    cp "$work"/unpacked/usr/include/libaio.h "$venv/include/"
    find "$work/unpacked" -name 'libaio.*' -not -name '*.h' -exec cp -P {} "$venv/lib/" \;
    rm -rf "$work"
  fi
  export CPATH=$venv/include LIBRARY_PATH=$venv/lib LD_LIBRARY_PATH=$venv/lib
}

command -v c++ >/dev/null || { say "a C++ compiler is missing: install g++"; exit 1; }
mkdir -p "$folder"
if ! "$python" -I -m pip --version >/dev/null 2>&1; then
  base=$(find_python)
  say "creating $venv with $("$base" --version)"
  "$base" -m venv --clear "$venv"
fi
find_libaio
export PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONHOME PYTHONPATH
say "installing torch, transformers and accelerate as in tools/constraints.txt (minutes: torch is large)"
"$python" -m pip install -q -c "$root/tools/constraints.txt" torch transformers accelerate safetensors
say "installing $deepspeed"
"$python" -m pip install -q setuptools wheel ninja py-cpuinfo
DS_ACCELERATOR=cpu DS_BUILD_OPS=0 "$python" -m pip install -q --no-build-isolation "$deepspeed"
say "compiling DeepSpeed's reader for NVMe"
PATH="$venv/bin:$PATH" DS_ACCELERATOR=cpu "$python" -c '
from deepspeed.ops.op_builder import AsyncIOBuilder
AsyncIOBuilder().load(verbose=False)' >"$venv/aio.log" 2>&1 || { cat "$venv/aio.log" >&2; say "compiling failed"; exit 1; }
"$python" -c '
import accelerate, torch, transformers
from importlib.metadata import version
print("setup_baselines: ready: deepspeed", version("deepspeed"), "torch", torch.__version__,
      "transformers", transformers.__version__)' >&2
