"""Model to graph: a forward is recorded, and what it asks of its tensors' shapes is answered."""

from __future__ import annotations

from .leaves import Leaf
from .tracer import DynamicShapes, trace_model

__all__ = ["DynamicShapes", "Leaf", "trace_model"]
