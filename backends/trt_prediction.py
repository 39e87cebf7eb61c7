"""What :func:`fxq.predict` returns: the kernels that an ONNX file should become, as data and as a table."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from io import StringIO
from typing import Any, Final

from ..tables import plain_console, readable
from .trt_kernels import LayerInfo, TensorInfo

__all__ = ["PredictedKernel", "Prediction", "tensor_text"]

_WIDTH: Final = 120


@dataclass(frozen=True)
class PredictedKernel(LayerInfo):
    """A kernel that the documented fusions give.

    Attributes:
        precision: What it computes in: ``int8``, ``float8``, ``float32`` … .
        module_path: The user's module that its main operation came from, if the file says so.
        source: The user's ``file:line``, if the file says so.
    """

    precision: str = "float32"
    module_path: str | None = None
    source: str | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights, scales and biases as far as their sizes are known."""
        return sum(tensor.nbytes or 0 for tensor in self.constants)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "name": self.name,
            "kind": self.kind,
            "precision": self.precision,
            "onnx_nodes": list(self.onnx_nodes),
            "module_path": self.module_path,
            "source": self.source,
            "inputs": [_tensor(tensor) for tensor in self.inputs],
            "outputs": [_tensor(tensor) for tensor in self.outputs],
            "constants": [_tensor(tensor) for tensor in self.constants],
            "activation_bytes": self.activation_bytes,
            "weight_bytes": self.weight_bytes,
        }


@dataclass(frozen=True)
class Prediction:
    """The kernels that an ONNX file should become; print it.

    Attributes:
        kernels: In an order in which they can run.
        library: Whose fusions: a key of :data:`fxq.backends.trt_fusions.LIBRARIES`.
        vanished: Names of ONNX nodes that need no kernel: constants that are folded, views, DQ that kernels absorb,
            and concatenations that the kernels in front of them write in place.
    """

    kernels: tuple[PredictedKernel, ...]
    library: str
    vanished: tuple[str, ...] = ()

    @property
    def weighted(self) -> tuple[PredictedKernel, ...]:
        """The convolutions and matrix products."""
        return tuple(kernel for kernel in self.kernels if kernel.weighted)

    @property
    def activation_bytes(self) -> int | None:
        """Bytes of activations read and written by one inference; None where a shape is dynamic or unknown."""
        sizes = [kernel.activation_bytes for kernel in self.kernels]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else None

    @property
    def weight_bytes(self) -> int:
        """Bytes of constants that the kernels hold."""
        return sum(kernel.weight_bytes for kernel in self.kernels)

    def kernel_of(self, node: str) -> PredictedKernel | None:
        """The kernel that computes an ONNX node; the one with the weights where there are two. None for no kernel."""
        found = [kernel for kernel in self.kernels if node in kernel.onnx_nodes]
        return next((kernel for kernel in found if kernel.weighted), found[0] if found else None)

    def summary(self) -> str:
        """One line."""
        low = sum(kernel.precision in {"int8", "float8"} for kernel in self.weighted)
        size = self.activation_bytes
        moved = "activations depend on the batch" if size is None else f"{readable(size)} of activations"
        return (
            f"{len(self.kernels)} kernels by the fusions of {self.library}: {low} of {len(self.weighted)} weighted "
            f"ones in 8 bits, {moved}, {readable(self.weight_bytes)} of weights"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "library": self.library,
            "activation_bytes": self.activation_bytes,
            "weight_bytes": self.weight_bytes,
            "kernels": [kernel.to_dict() for kernel in self.kernels],
            "vanished": list(self.vanished),
        }

    def text(self, width: int = _WIDTH) -> str:
        """The summary and a table of the kernels.

        Args:
            width: Columns.
        """
        from rich import box
        from rich.table import Table

        out = StringIO()
        console = plain_console(out, width)
        console.print(self.summary(), soft_wrap=True)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
        for name in ("kernel", "precision", "reads", "writes", "ONNX nodes"):
            table.add_column(name, overflow="fold")
        for kernel in self.kernels:
            table.add_row(
                kernel.kind,
                kernel.precision,
                "\n".join(tensor_text(tensor) for tensor in kernel.inputs),
                "\n".join(tensor_text(tensor) for tensor in kernel.outputs),
                " + ".join(kernel.onnx_nodes),
            )
        console.print(table)
        return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())

    def __str__(self) -> str:
        return self.text()


def tensor_text(tensor: TensorInfo) -> str:
    """``int8 1x64x56x56 200 kB``."""
    shape = "x".join("?" if dim < 0 else str(dim) for dim in tensor.shape)
    size = "" if tensor.nbytes is None else f" {readable(tensor.nbytes)}"
    return f"{tensor.dtype} {shape}{size}"


def _tensor(tensor: TensorInfo) -> dict[str, Any]:
    return {**dataclasses.asdict(tensor), "shape": list(tensor.shape), "nbytes": tensor.nbytes}
