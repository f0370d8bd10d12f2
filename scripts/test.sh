#!/usr/bin/env bash
# Lint, types and tests in .venv. `--slow` adds the tests marked slow; other arguments go to pytest.
set -euo pipefail
. "$(dirname "$0")/env.sh" dev
marks="not slow"
if [ "${1:-}" = --slow ]; then
    marks=""
    shift
fi
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
# Two processes of one thread each; the tests of a file share fixtures.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
.venv/bin/python -m pytest -m "$marks" -n 2 --dist loadfile "$@"
