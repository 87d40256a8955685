#!/usr/bin/env bash
# Build the environment of the peers (GPTQModel, optimum) in one command; the project's own stays untouched.
#
#     scripts/make_peer_venv.sh VENV_DIR [PYTHON]
#
# pip's own settings decide where packages come from. PYTHON defaults to python3.11.
set -euo pipefail

venv=${1:?usage: make_peer_venv.sh VENV_DIR [PYTHON]}
python=${2:-python3.11}
requirements=$(cd "$(dirname "$0")/.." && pwd)/benchmarks/peers/requirements.txt
cut_line='^# --no-deps'

if [ -e "$venv" ]; then
    echo "$venv exists; remove it or name another folder" >&2
    exit 1
fi

"$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip install --quiet)
"${pip[@]}" -r <(sed "/$cut_line/,\$d" "$requirements")
"${pip[@]}" --no-deps -r <(sed "1,/$cut_line/d" "$requirements")

"$venv/bin/python" - <<'PY'
import importlib.metadata as metadata

import gptqmodel  # noqa: F401  (fails here if one of its needs is missing)

for name in ("gptqmodel", "optimum", "torch", "transformers"):
    print(name, metadata.version(name))
PY
