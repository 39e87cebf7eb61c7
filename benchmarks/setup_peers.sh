#!/bin/bash
# The environment of the tools that fxq is compared with:
#   setup_peers.sh DIR     then     compare.py --peers-python DIR/bin/python
# Versions are pinned: the figures are about them. PYTHON names the interpreter (default python3.11).
set -eu
dir=${1:?usage: setup_peers.sh DIR}
pip="$dir/bin/pip install -q"
torch="torch==2.13.0"

"${PYTHON:-python3.11}" -m venv "$dir"
$pip "$torch"
$pip --no-deps torchvision==0.28.0 # with its dependencies it would replace torch
$pip "$torch" pillow requests onnx==1.21.0 onnxscript==0.7.2 onnx-graphsurgeon polygraphy onnxsim "nvidia-modelopt[onnx]==0.47.0"
"$dir/bin/pip" uninstall -q -y onnxruntime onnxruntime-gpu # modelopt brings the GPU build over the CPU one
$pip onnxruntime==1.31.1
$pip huggingface_hub safetensors pyyaml
