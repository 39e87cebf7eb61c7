"""For which shapes an exported file is meant: what its user said, or what calibration saw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..errors import ExportError
from .onnx_inputs import placeholder_values

__all__ = ["SeenShapes", "shape_ranges"]

_ENDLESS: Final = 1 << 31
"""What torch.export takes for no upper end lies beyond."""

Shape = tuple[int, ...]


class SeenShapes:
    """Counts the shapes that a graph's input tensors come in.

    Args:
        gm: The graph.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.counts: Counter[tuple[Shape, ...]] = Counter()

    def see(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Count one call of the graph; one that does not fit it is left to the graph to refuse."""
        try:
            leaves = pytree.tree_leaves(tuple(placeholder_values(self.gm, args, kwargs)))
        except ExportError:
            return
        self.counts[tuple(tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor))] += 1

    def summary(self) -> list[list[list[int]]]:
        """For each input tensor ``[smallest, most frequent, largest]`` shape, the ends dimension by dimension.

        Empty where nothing was seen, or where the number of tensors or dimensions changed.
        """
        ranks = {tuple(map(len, shapes)) for shapes in self.counts}
        if len(ranks) != 1:
            return []
        usual = self.counts.most_common(1)[0][0]
        found = []
        for index, shape in enumerate(usual):
            sizes = list(zip(*(shapes[index] for shapes in self.counts), strict=True))
            found.append([[min(s) for s in sizes], list(shape), [max(s) for s in sizes]])
        return found


def shape_ranges(
    names: Sequence[str],
    examples: Sequence[Tensor],
    dims: Sequence[Mapping[int, Any]],
    seen: Sequence[Sequence[Sequence[int]]],
) -> dict[str, list[list[int]]]:
    """The smallest, usual and largest shape of each dynamic input, as far as somebody said or saw it.

    A range that the user gave holds as it is. A dimension that is free goes up to the largest size that was seen
    and down to the smallest; the first one, taken for the batch, down to 1.

    Args:
        names: Input names.
        examples: The example for each.
        dims: For each ``{dimension: torch.export.Dim}``.
        seen: What :meth:`SeenShapes.summary` gave; empty for nothing.

    Returns:
        Input name to ``[min, opt, max]``; inputs of which a dynamic dimension is not known are left out.
    """
    found = {}
    for index, (name, example, dynamic) in enumerate(zip(names, examples, dims, strict=True)):
        known = seen[index] if len(seen) == len(names) and len(seen[index][1]) == example.ndim else None
        ranges = {axis: _range(axis, dim, example.shape[axis], known) for axis, dim in dynamic.items()}
        if dynamic and all(ranges.values()):
            sizes = [ranges.get(axis) or (size, size, size) for axis, size in enumerate(example.shape)]
            found[name] = [list(shape) for shape in zip(*sizes, strict=True)]
    return found


def _range(axis: int, dim: Any, example: int, known: Sequence[Sequence[int]] | None) -> tuple[int, int, int] | None:
    low, high = int(getattr(dim, "min", 1) or 1), getattr(dim, "max", None)
    limited = isinstance(high, int) and high < _ENDLESS
    if known is None:
        return (low, example, int(high)) if limited and high is not None else None
    if limited and high is not None:
        return low, min(max(known[1][axis], low), int(high)), int(high)
    return 1 if axis == 0 else known[0][axis], known[1][axis], known[2][axis]
