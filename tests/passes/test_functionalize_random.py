"""Functionalize on random programs of views and writes."""

# ruff: noqa: ARG005 (the tables hold calls as users write them, of one signature each)

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from in_place import NORMALIZE, Program, same
from torch import Tensor
from toys import after, image

from fxq.errors import TraceError
from fxq.passes import Functionalize

# Random programs. Each step picks a tensor of the pool and what to do with it by numbers; a first, eager run
# turns these into calls with fixed arguments, which are then traced.


def view_step(x: Tensor, a: int, b: int) -> Callable[[Tensor], Tensor] | None:
    rank = x.dim()
    if rank == 0:
        return lambda t: t.unsqueeze(0)
    dim, other, size = a % rank, b % rank, x.shape[a % rank]
    kinds: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.transpose(dim, other),
        lambda t: t.permute(*(list(range(rank))[dim:] + list(range(rank))[:dim])),
        lambda t: t.reshape(-1),
        lambda t: t.flatten(dim),
        lambda t: t.unsqueeze(dim),
        lambda t: t.squeeze(dim),
        lambda t: t.movedim(dim, other),
        lambda t: t.detach(),
        lambda t: t.contiguous(),
        lambda t: t.expand(2, *x.shape),
    ]
    if size > 1:
        index = (slice(None),) * dim
        start = b % size
        kinds += [
            lambda t: t[(*index, start)],
            lambda t: t[(*index, slice(start, None))],
            lambda t: t[(*index, slice(None, None, 2))],
            lambda t: t[(*index, slice(-size + start, None), ...)],
            lambda t: t.chunk(2, dim)[1],
            lambda t: t.split(size - 1, dim)[b % 2],
            lambda t: t.unbind(dim)[start],
            lambda t: t.narrow(dim, start, 1),
            lambda t: t.select(dim, start - size),
        ]
    return kinds[(a * 7 + b) % len(kinds)]


def write_step(x: Tensor, a: int, b: int) -> Callable[[Tensor, Tensor], Any]:
    rank = x.dim()
    kinds: list[Callable[[Tensor, Tensor], Any]] = [
        lambda t, o: t.add_(1),
        lambda t, o: t.relu_(),
        lambda t, o: t.mul_(o.amax()),  # exact, in whatever order memory lies
        lambda t, o: operator.isub(t, 0.5),
        lambda t, o: F.leaky_relu(t, 0.3, inplace=True),
        lambda t, o: t.clamp_(-2, 2),
        lambda t, o: t.fill_(b),
        lambda t, o: t.zero_(),
        lambda t, o: t.masked_fill_(t > 0.5, a),
        lambda t, o: operator.setitem(t, t < 0, b),
        lambda t, o: t.copy_(o.amin()),
    ]
    if rank:
        dim, size = a % rank, x.shape[a % rank]
        index = (slice(None),) * dim
        kinds += [
            lambda t, o: operator.setitem(t, (*index, b % size), a),
            lambda t, o: operator.setitem(t, (*index, slice(b % size, None)), o.amax()),
            lambda t, o: operator.setitem(t, (*index, slice(0, 1)), t[(*index, slice(size - 1, size))] + 1),
            lambda t, o: t.add_(t.flip(dim)),
            lambda t, o: t[(*index, b % size)].sub_(2),
        ]
    return kinds[(a * 5 + b) % len(kinds)]


def resolve(shape: tuple[int, ...], steps: list[tuple[bool, int, int, int, int]]) -> Callable[[Tensor], Any]:
    """The program that these numbers mean; steps that PyTorch itself refuses are left out."""
    pool = [image(*shape) * 2]
    program: list[tuple[bool, int, int, Any]] = []
    for write, first, second, a, b in steps:
        i, j = first % len(pool), second % len(pool)
        try:
            if write:
                step: Any = write_step(pool[i], a, b)
                result = step(pool[i], pool[j])
            else:
                step = view_step(pool[i], a, b)
                result = step(pool[i])
        except (RuntimeError, UserWarning):  # several elements in one place
            continue
        program.append((write, i, j, step))
        if result is not None:
            pool.append(result)

    def run(x: Tensor) -> Any:
        live = [x * 2]
        for write, i, j, step in program:
            result = step(live[i], live[j]) if write else step(live[i])
            if result is not None:
                live.append(result)
        return tuple(live)

    return run


STEPS = st.lists(st.tuples(st.booleans(), *[st.integers(0, 11)] * 4), min_size=1, max_size=12)


@settings(max_examples=150)
@given(shape=st.sampled_from([(2, 3, 4), (3, 2), (4,), (1, 2, 1, 3)]), steps=STEPS)
def test_random_programs(shape: tuple[int, ...], steps: list[tuple[bool, int, int, int, int]]) -> None:
    model = Program(resolve(shape, steps))
    x = image(*shape)
    try:
        gm = after((Functionalize(),), model, x)
    except TraceError as error:
        if "through expand" not in error.message:  # the only view here whose memory cannot be put back
            raise
        return
    same(gm, model, x)
    same(after(NORMALIZE, model, x), model, x)
