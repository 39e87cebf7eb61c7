"""LeNet, trained here on MNIST for 3 epochs with fixed seeds: top-1 in float and INT8 on the test images.

FXQ_DATA=DIR python benchmarks/mnist.py --peers fxq
"""

from __future__ import annotations

import cifar
import runner

PEERS = "fp32,fxq,modelopt_torch_max,modelopt_onnx_max"
TASK = "mnist_lenet"


def main() -> None:
    args = runner.parse(runner.options(__doc__, PEERS, engine=False))
    runner.finish(runner.run_all(args, [TASK]), [TASK], args, cifar.COLUMNS)


if __name__ == "__main__":
    main()
