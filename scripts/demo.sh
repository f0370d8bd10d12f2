#!/usr/bin/env bash
# Compresses a real language model on this machine and prints what it gained and lost. Needs Python 3.11 and pip.
# Further arguments go to `compress run`, e.g. `bash scripts/demo.sh --set weights.scheme=fp8_dynamic`.
set -euo pipefail
. "$(dirname "$0")/env.sh" demo
exec .venv/bin/compress run recipes/smollm2-nvfp4.yaml "$@"
