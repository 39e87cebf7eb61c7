#!/bin/bash
# The environment of Brevitas:
#   setup_brevitas.sh DIR     then     lint_peers.py --brevitas-python DIR/bin/python
# Versions are pinned: the findings are about them. PYTHON names the interpreter (default python3.11).
set -eu
dir=${1:?usage: setup_brevitas.sh DIR}
pip="$dir/bin/pip install -q"

"${PYTHON:-python3.11}" -m venv "$dir"
$pip torch==2.13.0
$pip --no-deps torchvision==0.28.0 # with its dependencies it would replace torch
$pip torch==2.13.0 brevitas==0.13.4 onnx onnxruntime==1.31.1 onnxscript==0.7.2 onnxoptimizer==0.4.2 pillow
