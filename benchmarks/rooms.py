"""Where a stage's time goes: the profiler's own-time, summed by fxq's rooms and by library."""

from __future__ import annotations

import pstats
from collections import Counter
from pathlib import PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import cProfile

FXQ_FOLDERS = ("passes", "backends")
GRAPH_CODE = "<eval_with_key>"  # what torch.fx calls the generated forward of a GraphModule
BUILTIN = "~"  # what the profiler calls the file of a function written in C


def room(filename: str) -> str:
    """A file's owner: `fxq.observing.base`, `torch.onnx`, `onnx`, `network` (a graph's operations), `python`."""
    if filename.startswith(GRAPH_CODE):
        return "network"
    parts = PurePath(filename).with_suffix("").parts
    if "site-packages" in parts:
        inside = parts[len(parts) - parts[::-1].index("site-packages") :]
    elif "fxq" in parts:
        inside = parts[len(parts) - 1 - parts[::-1].index("fxq") :]
    elif len(parts) > 1 and parts[-2] in FXQ_FOLDERS:  # reached past the link in fxq/
        inside = ("fxq", *parts[-2:])
    else:
        return "python"
    if inside[0] == "torch":  # its files as `torch`, its subpackages by name
        return ".".join(inside[: 2 if len(inside) > 2 else 1])
    return ".".join(inside) if inside[0] == "fxq" else inside[0]


def by_room(profile: cProfile.Profile) -> dict[str, float]:
    """Seconds of own time per room, longest first.

    A function written in C has no file: its time goes to the rooms that called it, so that a convolution
    counts where it was asked for.
    """
    seconds: Counter[str] = Counter()
    stats = pstats.Stats(profile).stats
    for (filename, _, _), (_, _, own, _, callers) in stats.items():
        if filename != BUILTIN:
            seconds[room(filename)] += own
        elif not callers:
            seconds["python"] += own
        else:
            for (caller, _, _), (_, _, share, _) in callers.items():
                seconds[room(caller)] += share
    return dict(seconds.most_common())
