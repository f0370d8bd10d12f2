#!/usr/bin/env bash
# Makes the environment of a tool that scripts/bench.py compares this package with: .venv-peer-NAME, pinned versions.
# Usage: bash scripts/peers_env.sh autoround | gptqmodel | modelopt      (llm-compressor lives in .venv)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

name=${1:-}
python=${PYTHON:-python3}
common=(torch==2.13.0 safetensors==0.8.0 numpy==2.4.6 accelerate==1.15.0 datasets==5.2.0 requests==2.34.2)
case "$name" in
    autoround)
        packages=("${common[@]}" transformers==5.17.0 auto-round==0.16.1 compressed-tensors==0.19.0)
        ;;
    gptqmodel)
        # 7.5.0 is the newest that runs on torch 2.13 (7.7.0 asks for 2.14.1); it pins its own numpy. It compiles
        # an extension: a C++ compiler must be there.
        packages=(torch==2.13.0 transformers==5.17.0 gptqmodel==7.5.0 requests==2.34.2)
        ;;
    modelopt)
        # modelopt 0.47 asks for transformers < 5.15.
        packages=("${common[@]}" transformers==5.14.1 nvidia-modelopt==0.47.0 peft==0.21.2)
        ;;
    *)
        echo "usage: bash scripts/peers_env.sh autoround | gptqmodel | modelopt" >&2
        exit 2
        ;;
esac

folder=.venv-peer-$name
stamp=$folder/.installed
want=$(echo "${packages[*]}" | cksum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then exit 0; fi
[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
echo "making $folder: ${packages[*]}" >&2
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile "${packages[@]}"
if [ "$name" = gptqmodel ]; then
    # What it would else compile during its first run, which is timed: about a minute.
    "$folder/bin/python" -c "from gptqmodel import extension; extension.load(name='pack_block_cpu')" > /dev/null
fi
echo "$want" > "$stamp"
