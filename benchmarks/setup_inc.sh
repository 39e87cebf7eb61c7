#!/bin/bash
# The environment of Intel Neural Compressor's ONNX half, which wants old versions of what the other tools use:
#   setup_inc.sh DIR     then     onnxruntime_cpu.py --inc-python DIR/bin/python
# Versions are pinned: the figures are about them. PYTHON names the interpreter (default python3.11).
set -eu
dir=${1:?usage: setup_inc.sh DIR}
pip="$dir/bin/pip install -q"

"${PYTHON:-python3.11}" -m venv "$dir"
$pip torch==2.13.0
$pip --no-deps torchvision==0.28.0 # with its dependencies it would replace torch
$pip --no-deps neural_compressor==2.6
$pip "numpy<2" onnx==1.16.1 onnxruntime==1.18.1 onnxscript==0.5.7 opencv-python-headless==4.11.0.86 pandas psutil py-cpuinfo prettytable pycocotools pyyaml requests schema scikit-learn "setuptools<80" Deprecated
