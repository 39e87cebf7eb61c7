"""Float32 constants in a compute dtype: what survives the conversion, and what does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import torch

from ..errors import ExportError

if TYPE_CHECKING:
    import onnx

__all__ = ["COMPUTE_DTYPES", "STANDS_FOR_INFINITY", "ComputeDtype", "compute_dtype"]

Array = npt.NDArray[Any]

STANDS_FOR_INFINITY: Final = float(np.finfo(np.float32).max) / 2
"""Magnitudes from here on are masks (``torch.finfo(x.dtype).min``): what they are in another type is its own
extreme.
"""


@dataclass(frozen=True)
class ComputeDtype:
    """A type for everything that is not quantized.

    Attributes:
        name: What the user calls it.
        onnx_name: ONNX's name in lower case.
        dtype: torch's.
        opset: The first opset whose Q/DQ and other operators take it (R15).
    """

    name: str
    onnx_name: str
    dtype: torch.dtype
    opset: int

    @property
    def element_type(self) -> int:
        """ONNX's number of the type."""
        import onnx

        return int(onnx.TensorProto.DataType.Value(self.onnx_name.upper()))

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return float(torch.finfo(self.dtype).max)

    @property
    def headroom(self) -> float:
        """The largest magnitude that an activation may show on calibration data: a quarter of :attr:`largest`.

        Other data will reach somewhat further, and one overflow becomes NaN in the next normalization.
        """
        return self.largest / 4

    @property
    def has_less_range(self) -> bool:
        """Whether float32 holds numbers that are beyond this type."""
        return self.largest < STANDS_FOR_INFINITY

    def rounded(self, values: Array) -> Array:
        """float32 values as this type holds them, in float32; masks become its own extremes."""
        bounded = np.where(np.abs(values) >= STANDS_FOR_INFINITY, np.sign(values) * self.largest, values)
        exact = np.where(np.isinf(values), values, bounded).astype(np.float32)
        return torch.from_numpy(exact).to(self.dtype).float().numpy().reshape(values.shape)

    def holds(self, values: Array, *, closely: bool = False) -> bool:
        """Whether float32 values survive: none overflows and, for scales and lone numbers, none loses much.

        Args:
            values: Any shape.
            closely: Also ask that each keeps 8 bits: an INT8 step of a scale that is off by more moves the
                largest integers by more than half a step; an epsilon that becomes 0 guards nothing.
        """
        kept = self.rounded(values)
        overflow = np.isfinite(values) & ~np.isfinite(kept)
        if overflow.any():
            return False
        ordinary = np.isfinite(values) & (np.abs(values) < STANDS_FOR_INFINITY)
        return not closely or bool((np.abs(kept - values)[ordinary] <= np.abs(values)[ordinary] / 256).all())

    def tensor(self, name: str, values: Array) -> onnx.TensorProto:
        """An initializer of this type; masks become its own extremes, and so does what is beyond them."""
        import onnx

        held = torch.from_numpy(np.ascontiguousarray(self.rounded(values)))
        bits = held.to(self.dtype).view(torch.int16 if self.dtype.itemsize == 2 else torch.int32)
        return onnx.helper.make_tensor(name, self.element_type, values.shape, bits.numpy().tobytes(), raw=True)


COMPUTE_DTYPES: Final = {
    kind.name: kind
    for kind in (
        ComputeDtype("fp32", "float", torch.float32, 18),
        ComputeDtype("fp16", "float16", torch.float16, 19),
        ComputeDtype("bf16", "bfloat16", torch.bfloat16, 22),
    )
}
"""The compute dtypes by name."""


def compute_dtype(name: str) -> ComputeDtype:
    """The compute dtype of that name.

    Raises:
        ExportError: There is none.
    """
    if name not in COMPUTE_DTYPES:
        raise ExportError(f"no compute dtype is called {name!r}", hint=f"use one of {', '.join(COMPUTE_DTYPES)}")
    return COMPUTE_DTYPES[name]
