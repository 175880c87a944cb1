#!/usr/bin/env bash
# Make .venv at the project's root ready: the project, editable, with the versions of tools/constraints.txt.
# Usage: bash tools/setup.sh        Needs Python 3.11 or newer with venv and pip; PYTHON=/path/to/python chooses one.
# Nothing to do (the usual case): returns in a fraction of a second. Says what it does on stderr; stdout stays empty.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
python=$venv/bin/python
stamp=$venv/.offload-rt-stamp
log=$venv/.offload-rt-setup.log

say() { printf 'setup: %s\n' "$*" >&2; }

# What the installed state depends on: both files, the Python, and where the project lies (scripts hold its path).
fingerprint() {
  "$python" -I -c '
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
files = [(root / name).read_bytes() for name in ("pyproject.toml", "tools/constraints.txt")]
print(hashlib.sha256(b"\0".join([sys.version.encode(), bytes(root), *files])).hexdigest())' "$root"
}

is_ready() {
  local now
  [[ -f $stamp && -x $venv/bin/offload-run ]] && now=$(fingerprint 2>/dev/null) && [[ $(<"$stamp") == "$now" ]]
}

find_python() {
  local name
  for name in ${PYTHON:+"$PYTHON"} python3 python3.14 python3.13 python3.12 python3.11 python; do
    if "$name" -I -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      printf '%s\n' "$name"
      return
    fi
  done
  say "no Python 3.11 or newer found: install one, or set PYTHON to its path"
  exit 1
}

# Run a command with its output in the log; show the log only when the command fails.
logged() {
  local what=$1
  shift
  if ! "$@" >>"$log" 2>&1 </dev/null; then
    cat "$log" >&2
    say "$what failed; pip's and Python's own words are above"
    exit 1
  fi
}

if is_ready; then
  exit 0
fi

# One run at a time (a second waits, then finds the work done). The lock goes when this process ends.
exec 9<"$root/pyproject.toml"
if command -v flock >/dev/null; then
  flock 9
  if is_ready; then
    exit 0
  fi
fi

# `python -m pip` works only in a complete environment: an interrupted `venv` is cleared and made again.
if ! "$python" -I -m pip --version >/dev/null 2>&1; then
  base=$(find_python)
  say "creating .venv with $("$base" --version)"
  mkdir -p "$venv"
  : >"$log"
  logged "creating .venv" env -u PYTHONHOME "$base" -m venv --clear "$venv"
fi
: >"$log"
rm -f "$stamp"

# pip writes INSTALLER after a package's files. Metadata without it is a package cut off half way, which pip
# would take for installed: forget it, so that it is installed again.
"$python" -I -c '
import pathlib, shutil, sysconfig
for info in pathlib.Path(sysconfig.get_path("purelib")).glob("*.dist-info"):
    if not (info / "INSTALLER").exists():
        shutil.rmtree(info)'

say "installing into .venv (the first time takes minutes: torch is large)"
logged "pip install" env -u PYTHONHOME -u PYTHONPATH PIP_DISABLE_PIP_VERSION_CHECK=1 \
  "$python" -m pip install -q -c "$root/tools/constraints.txt" -e "$root[demo,dev]"
fingerprint >"$stamp.$$"
mv "$stamp.$$" "$stamp"
