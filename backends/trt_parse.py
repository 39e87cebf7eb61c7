"""ONNX → TensorRT network, with errors that lead back to the user's model."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from os import PathLike, fspath
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..errors import BuildError
from .onnx_names import MODULE_PATH, NODE, SOURCE, properties
from .trt_api import network_flags
from .trt_callbacks import tensorrt_logger

if TYPE_CHECKING:
    import onnx

__all__ = ["OnnxSource", "parse_onnx", "refusal"]


@dataclass(frozen=True)
class OnnxSource:
    """A serialized ONNX model and the file that it came from, if any.

    Attributes:
        data: The serialized model; weights may be in files beside it.
        path: Its file, or None for a model that was given as bytes.
    """

    data: bytes
    path: Path | None = None

    @classmethod
    def read(cls, model: str | PathLike[str] | bytes) -> OnnxSource:
        """Take bytes as they are, and read a file.

        Raises:
            BuildError: There is no such file.
        """
        if isinstance(model, bytes):
            return cls(model)
        path = Path(fspath(model))
        if not path.is_file():
            raise BuildError(f"there is no ONNX file {path}", hint="export it first: fxq.export(quantized, path)")
        return cls(path.read_bytes(), path)

    @property
    def name(self) -> str:
        """What messages call it."""
        return str(self.path) if self.path else "the ONNX model"

    @cached_property
    def model(self) -> onnx.ModelProto | None:
        """The model without the weights that lie beside it, or None where the bytes are no model."""
        import onnx
        from google.protobuf.message import DecodeError

        try:
            return onnx.load_model_from_string(self.data)
        except DecodeError:
            return None

    @property
    def quantized(self) -> bool:
        """Whether the model has a QuantizeLinear or a DequantizeLinear."""
        return self.model is not None and any(
            node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in self.model.graph.node
        )

    def metadata(self) -> dict[str, str]:
        """The model's metadata_props."""
        return {} if self.model is None else {entry.key: entry.value for entry in self.model.metadata_props}

    def digest(self) -> str:
        """SHA-256 of the model and of all weights, those in files beside it included.

        Raises:
            BuildError: A weight file is not there.
        """
        found = hashlib.sha256(self.data)
        for file in self._weight_files():
            try:
                with file.open("rb") as opened:
                    found.update(hashlib.file_digest(opened, "sha256").digest())
            except OSError as error:
                raise BuildError(
                    f"{self.name} keeps weights in {file}, which cannot be read: {error.strerror}",
                    hint="keep a model and its external data in one folder",
                ) from error
        return found.hexdigest()

    def _weight_files(self) -> list[Path]:
        if self.model is None or self.path is None:
            return []
        entries = (entry for tensor in self.model.graph.initializer for entry in tensor.external_data)
        return [self.path.parent / name for name in sorted({e.value for e in entries if e.key == "location"})]


@dataclass(frozen=True)
class _Origin:
    """Where an ONNX node came from, as far as the file says."""

    node: str
    op_type: str = ""
    module_path: str | None = None
    source: str | None = None
    fx_node: str | None = None

    def __str__(self) -> str:
        text = f"{self.node} ({self.op_type})" if self.op_type else self.node
        if self.fx_node and self.fx_node != self.node:
            text += f", FX node {self.fx_node}"
        places = [place for place in (self.module_path, self.source) if place]
        return f"{text}, from {' at '.join(places)}" if places else text


def parse_onnx(trt: ModuleType, builder: Any, source: OnnxSource) -> tuple[Any, Any]:
    """Parse a model into a strongly typed network.

    Returns:
        The network, and the parser: it owns the weights that the network refers to, so it must live as long.

    Raises:
        BuildError: The parser refuses the model; every one of its errors is in the message.
    """
    network = builder.create_network(network_flags(trt))
    parser = trt.OnnxParser(network, tensorrt_logger(trt))
    path = None if source.path is None else str(source.path)  # for weights that are stored beside the file
    if not parser.parse(source.data, path):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        raise _parse_failure(source, errors)
    if network.num_outputs == 0:
        raise BuildError(f"{source.name} has no outputs", hint="is it an ONNX model, and was it written to the end?")
    return network, parser


def _parse_failure(source: OnnxSource, errors: list[Any]) -> BuildError:
    model = source.model
    if model is None:
        return BuildError(f"{source.name} is no readable ONNX model", hint="check it with onnx.checker.check_model")
    origins = _origins(model)
    lines, first = [], None
    for error in errors:
        name = error.node_name()
        if not name and 0 <= error.node() < len(model.graph.node):
            name = model.graph.node[error.node()].name
        origin = origins.get(name) or _Origin(name or "the model", error.node_operator())
        first = first or origin
        lines.append(f"{origin}: {' '.join(error.desc().split())}")
    return _failure(f"TensorRT's parser refuses {source.name}", lines, first)


def refusal(source: OnnxSource, reasons: Iterable[str], hint: str | None = None) -> BuildError:
    """The error for a network that parsed but that the builder refuses.

    Args:
        source: The model, for the origins of the nodes that the reasons mention by name.
        reasons: What TensorRT logged as errors.
        hint: The next step, where more is known than that the file may break a rule.
    """
    origins = _origins(source.model) if source.model else {}
    lines, first = [], None
    for reason in reasons:
        mentioned = [origin for name, origin in origins.items() if _mentions(reason, name)]
        first = first or next(iter(mentioned), None)
        lines.append(" ".join([*reason.split(), *(f"[{origin}]" for origin in mentioned)]))
    return _failure(f"TensorRT cannot build {source.name}", lines or ["it gives no reason"], first, hint)


def _failure(message: str, lines: list[str], origin: _Origin | None, hint: str | None = None) -> BuildError:
    return BuildError(
        "\n".join([f"{message}:", *(f"  - {line}" for line in lines)]),
        node=origin.node if origin else None,
        module_path=origin.module_path if origin else None,
        source=origin.source if origin else None,
        hint=hint or "fxq.lint(path) names the rules that a file breaks; verbose_log=… keeps the whole log",
    )


def _mentions(text: str, name: str) -> bool:
    """Whether ``name`` stands in ``text`` as a whole word: "conv1" is not in "conv10" or "layer1.conv1"."""
    return re.search(rf"(?<![\w./]){re.escape(name)}(?![\w/]|\.\w)", text) is not None


def _origins(model: onnx.ModelProto) -> dict[str, _Origin]:
    """Node name to origin for every node, those of subgraphs included."""
    found: dict[str, _Origin] = {}
    graphs = [model.graph]
    while graphs:
        for node in graphs.pop().node:
            keys = properties(node)
            if node.name:
                found[node.name] = _Origin(
                    node.name, node.op_type, keys.get(MODULE_PATH), keys.get(SOURCE), keys.get(NODE)
                )
            for attribute in node.attribute:
                graphs += [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
    return found
