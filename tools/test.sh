#!/usr/bin/env bash
# Every check of this project: style, types, tests. Stops at the first that fails.
# Usage: bash tools/test.sh [option of pytest]...        e.g. -k pipeline, -x
set -euo pipefail

unset PYTHONDONTWRITEBYTECODE  # the tests start many Pythons: compiled once, not each time
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
bash tools/setup.sh
python=.venv/bin/python

step() {
  local name=$1
  shift
  printf '== %s\n' "$name"
  if ! "$@"; then
    printf '== %s: FAILED\n' "$name" >&2
    exit 1
  fi
}

step "ruff check" "$python" -m ruff check .
step "ruff format --check" "$python" -m ruff format --check .
step "mypy" "$python" -m mypy --num-workers auto  # of a fresh checkout it is 84 s of one processor
# The tests are shared out to processes, each with one thread of arithmetic, or they wait for each other. A process has a
# file's tests together, so that models and engines are made once, and at its end takes over some of another's. Some tests
# time things or look at the page cache, which the others disturb: what failed beside others has to pass alone.
run_tests() {
  local code=0
  OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "$python" -m pytest -q -n auto --maxprocesses 4 --dist worksteal "$@" || code=$?
  if ((code != 1)); then
    return "$code"
  fi
  printf '== pytest: what failed, alone\n'
  "$python" -m pytest -q --last-failed "$@"
}
step "pytest" run_tests "$@"
printf '== all checks passed\n'
