#!/usr/bin/env bash
# The tests marked `cuda`, on the GPU of this machine. PYTHON names an interpreter that has torch for CUDA and
# triton, pytest and the packages of pyproject.toml; without a GPU they run in Triton's interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-.venv/bin/python}" -m pytest -m cuda -rs tests/kernels tests/kv "$@"
