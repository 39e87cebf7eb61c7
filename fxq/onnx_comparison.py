"""An ONNX file in ONNX Runtime, tensor by tensor against the PyTorch model or another file.

The file runs as it stands, each Q and DQ included, and each tensor of it is set beside the one of the same name. Files
from fxq say in each node's metadata which node of the graph it was, and a graph's nodes are called after the model's
modules; so a file meets the model that it came from, however either was quantized. The outputs meet by their order, so
any two files of one model can be compared.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .batches import Inputs, model_inputs, moved
from .comparison import Comparison, ComparisonRow
from .errors import CalibrationError, FxqError
from .flow import prepare
from .graph import device_of, has_state
from .sqnr import ErrorSums
from .stepping import Ahead, Stepper, quantizing

if TYPE_CHECKING:
    from .backends.onnxrt import Session

__all__ = ["FileComparison", "compare_onnx"]

Values: TypeAlias = Iterator[tuple[str, Any]]
"""Names and values, in the order in which they are computed."""


@dataclass(frozen=True)
class FileComparison(Comparison):
    """What :func:`fxq.compare_onnx` returns; prints as a table.

    Attributes:
        outputs: The rows of the file's outputs.
    """

    subject: ClassVar[str] = "a file against its reference"
    series: ClassVar[str] = "the file"

    outputs: tuple[ComparisonRow, ...] = field(default=())

    def text(self, worst: int | None = None) -> str:
        """The comparison for people.

        Args:
            worst: Show so many tensors, those at which most is lost, worst first; None (default) shows all in the
                file's order.
        """
        rows = self.rows if worst is None else self.drops(worst) or self.worst(worst)
        return "\n".join([*self._summary(), "", self.table(rows)])

    @classmethod
    def of_outputs(cls, found: Mapping[str, Tensor], expected: Sequence[Tensor]) -> FileComparison:
        """Outputs against what they should be, in their order.

        Raises:
            FxqError: There are more or fewer, or they have other shapes.
        """
        shapes = [tuple(tensor.shape) for tensor in found.values()]
        if shapes != [tuple(tensor.shape) for tensor in expected]:
            raise FxqError(
                f"the outputs have the shapes {shapes}, and the reference's {[tuple(t.shape) for t in expected]}",
                hint="compare two files of one model, or a file with its model",
            )
        rows = []
        for (name, tensor), wanted in zip(found.items(), expected, strict=True):
            sums = ErrorSums()
            sums.add(wanted.cpu(), tensor.cpu())
            rows.append(ComparisonRow(name, "output", "", None, sums.sqnr, sums.cosine, sums.largest))
        return cls(tuple(rows), max((shape[0] for shape in shapes if shape), default=1), outputs=tuple(rows))


def compare_onnx(path: str | Path, reference: nn.Module | str | Path, inputs: Any) -> FileComparison:
    """Compare what an ONNX file computes in ONNX Runtime with a PyTorch model or another file, tensor by tensor.

    Differences add up along the network; a row's `drop` is what is lost at that tensor. The file's rewrites by ONNX
    Runtime are left out, so that every tensor can be seen.

    Args:
        path: An ONNX file, from any tool.
        reference: The PyTorch model; a prepared graph, whose quantizers stand aside, or a converted one; or another
            ONNX file, such as the float one.
        inputs: One batch: a tensor, a tuple of inputs, or a dict by name. Or an iterable of batches. Floats are cast to
            the types that a file takes.

    Returns:
        A row for each tensor that both have under one name, and for each output, in the file's order.

    Raises:
        CalibrationError: There is no input, or it does not fit the reference.
        EngineError: ONNX Runtime cannot run a file.
        FxqError: The two have no tensor in common, or tensors of one name and different shapes.
    """
    batches = [inputs] if isinstance(inputs, Tensor | tuple | Mapping | Inputs) else list(inputs)
    if not batches:
        raise CalibrationError("there is no input to compare on", hint="pass one batch or more")
    file = _File(path)
    other: _File | _Graph = (
        _Graph(reference, file.fitted(reference, batches[0])) if isinstance(reference, nn.Module) else _File(reference)
    )
    sums: dict[str, ErrorSums] = {}
    samples = 0
    with torch.no_grad():
        for batch in batches:
            samples += _compare_batch(file, other, batch, sums)
    if not sums:
        raise FxqError(
            f"{file.session.path.name} has no tensor in common with {other.name}",
            hint="compare a file with the model that it was exported from, or with another file of that model",
        )
    rows = tuple(_rows(file, sums))
    return FileComparison(rows, samples, outputs=tuple(row for row in rows if row.node in file.outputs))


def _compare_batch(file: _File, other: _File | _Graph, batch: Any, sums: dict[str, ErrorSums]) -> int:
    """Run both on one batch; returns how many samples it has."""
    reference, tensors = other.begin(batch, file)
    renamed = dict(zip(other.outputs, file.outputs, strict=True)) if len(other.outputs) == len(file.outputs) else {}
    stream = ((renamed.get(name, name), value) for name, value in reference)
    expected = Ahead(stream, file.names & {renamed.get(name, name) for name in other.names})
    feeds = file.inputs(tensors)
    for name, value in file.values(feeds):
        wanted = expected.take(name)
        if not isinstance(wanted, Tensor) or not (wanted.is_floating_point() and value.is_floating_point()):
            continue
        if wanted.shape != value.shape:
            raise FxqError(
                f"{name} has shape {tuple(value.shape)} in {file.session.path.name} and {tuple(wanted.shape)} in "
                f"{other.name}",
                hint="compare a file with the model that it was exported from, or with another file of that model",
            )
        sums.setdefault(name, ErrorSums()).add(wanted.cpu(), value)
    return max((len(tensor) for tensor in feeds.values() if tensor.ndim), default=1)


class _File:
    """An ONNX file and its tensors, by the names of the graph that it came from."""

    def __init__(self, path: str | Path) -> None:
        from .backends.onnx_compare import value_names
        from .backends.onnxrt import Session

        self.session: Session = Session(path, optimize=False)
        self.labels = {onnx: label for label, onnx in value_names(self.session).items()}
        self.outputs = tuple(self.labels[name] for name in self.session.output_names if name in self.labels)
        self.names = frozenset(self.labels.values())
        self.name = self.session.path.name

    def fitted(self, model: nn.Module, batch: Any) -> Any:
        """A batch by the file's input names as a tuple in their order, if the model has other names; else as it is."""
        names = self.session.input_names
        if not isinstance(batch, Mapping) or set(batch) != set(names):
            return batch
        known = set(names) <= set(inspect.signature(model.forward).parameters)
        return batch if known else tuple(batch[name] for name in names)

    def begin(self, batch: Any, _: _File) -> tuple[Values, Mapping[str, Tensor]]:
        """Every tensor of a run on a batch, and what the other side is to be given."""
        feeds = self.inputs(batch)
        return self.values(feeds), feeds

    def inputs(self, batch: Any) -> dict[str, Tensor]:
        """A batch by the file's input names, in the types that it takes."""
        names = self.session.input_names
        if isinstance(batch, Mapping):
            named = dict(batch) if set(batch) == set(names) else dict(zip(names, batch.values(), strict=False))
        else:
            tensors = [batch] if isinstance(batch, Tensor) else list(batch)
            named = dict(zip(names, tensors, strict=False))
        if len(named) != len(names):
            raise CalibrationError(f"a batch holds {len(named)} inputs and {self.name} takes {', '.join(names)}")
        dtypes = self.session.input_dtypes
        return {
            name: tensor.to(dtypes.get(name, tensor.dtype)) if tensor.is_floating_point() else tensor
            for name, tensor in named.items()
        }

    def values(self, given: Mapping[str, Tensor]) -> Values:
        """Every tensor that the file computes."""
        return ((self.labels.get(name, name), value) for name, value in self.session.run_all(given))


class _Graph:
    """A PyTorch model as a graph whose nodes have the names that an exported file has."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.name = type(model).__name__
        if isinstance(model, fx.GraphModule) and has_state(model):
            self.gm, self.name = model, "the graph"
        else:
            args, kwargs = model_inputs(model, example)
            self.gm = prepare(model, args, example_kwargs=kwargs)
        output = next(node for node in self.gm.graph.nodes if node.op == "output")
        self.outputs = tuple(leaf.name for leaf in pytree.tree_leaves(output.args) if isinstance(leaf, fx.Node))
        self.names = frozenset(node.name for node in self.gm.graph.nodes if node.op.startswith("call_"))

    def begin(self, batch: Any, file: _File) -> tuple[Values, Sequence[Tensor]]:
        """What each node gives on a batch, and the tensors of the batch in the order of the file's inputs."""
        from .backends.onnx_inputs import placeholder_values

        given = moved(model_inputs(self.gm, file.fitted(self.gm, batch)), device_of(self.gm))
        leaves = pytree.tree_leaves(placeholder_values(self.gm, *given))
        return self._values(given), [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def _values(self, given: Inputs) -> Values:
        """What each node gives; quantizers hand their tensor through."""
        stepper = Stepper(self.gm, lambda _: False)
        with quantizing(self.gm):
            for node, value in stepper.steps(stepper.begin(given)):
                yield node.name, value


def _rows(file: _File, sums: Mapping[str, ErrorSums]) -> Iterator[ComparisonRow]:
    """The rows in the file's order; a drop is measured against the worst tensor that the node reads."""
    from .backends.onnx_names import MODULE_PATH, SOURCE, properties

    worst: dict[str, float] = {}  # of each tensor: its own SQNR, or that of the worst one behind it
    for node in file.session.model.graph.node:
        before = min((worst[name] for name in node.input if name in worst), default=math.inf)
        held = properties(node)
        for name in node.output:
            found = sums.get(file.labels.get(name, name))
            worst[name] = before if found is None else found.sqnr
            if found is None:
                continue
            yield ComparisonRow(
                node=file.labels.get(name, name),
                kind=node.op_type,
                module_path=held.get(MODULE_PATH, ""),
                source=held.get(SOURCE),
                sqnr=found.sqnr,
                cosine=found.cosine,
                max_error=found.largest,
                drop=before - found.sqnr if before < math.inf else math.nan,
            )
