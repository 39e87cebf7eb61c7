"""Binding, streams, graphs and timing, with torch functions behind TensorRT's interface.

On the CPU the addresses are the host's; the tests marked gpu do the same with CUDA's streams, graphs and events.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch_engine import TRT, TorchEngine

from fxq.backends import trt_engine
from fxq.backends.latency import Latency, Timings, measure
from fxq.backends.trt_engine import benchmark
from fxq.backends.trt_session import Session
from fxq.errors import EngineError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
DEVICES = pytest.mark.parametrize("device", [CPU, pytest.param(CUDA, marks=pytest.mark.gpu)], ids=str)
WEIGHT = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))


def compute(x: Tensor, k: Tensor) -> dict[str, Tensor]:
    return {"y": torch.relu(x @ WEIGHT.to(x.device, x.dtype)) + k.to(x.dtype)[:, None], "n": k * 2}


def session(device: torch.device) -> Session:
    if device.type == "cuda":
        WEIGHT.data = WEIGHT.data.cuda()  # no copies inside a capture
    inputs = {
        "x": (torch.float32, (1, 8), (4, 8), (16, 8)),
        "k": (torch.int64, (1,), (4,), (16,)),
    }
    engine = TorchEngine(compute, inputs, {"y": torch.float32, "n": torch.int64}, str(device))
    return Session(TRT, engine, device, "test.engine")  # type: ignore[arg-type]


def given(batch: int, device: torch.device = CPU) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, 8, device=device), "k": torch.arange(batch, device=device)}


def check(found: dict[str, Tensor], inputs: dict[str, Tensor], device: torch.device) -> None:
    assert list(found) == ["y", "n"]
    expected = compute(**{name: tensor.to(device) for name, tensor in inputs.items()})
    for name, tensor in found.items():
        assert tensor.device == device
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)


@DEVICES
class TestRun:
    """What goes in and what comes out."""

    @pytest.mark.parametrize("batch", [1, 4, 16])
    def test_by_name_in_order_and_of_any_batch(self, device: torch.device, batch: int) -> None:
        held, inputs = session(device), given(batch)
        check(held.run(inputs), inputs, device)
        check(held.run([inputs["x"], inputs["k"]]), inputs, device)
        check(held.run({"k": inputs["k"], "x": inputs["x"]}), inputs, device)

    def test_tensors_on_the_device_are_read_where_they_lie(self, device: torch.device) -> None:
        held, inputs = session(device), given(3, device)
        held.run(inputs)
        assert held.context.addresses["x"] == inputs["x"].data_ptr()
        spread = {"x": torch.randn(8, 3, device=device).T, "k": inputs["k"]}
        check(held.run(spread), spread, device)
        assert held.context.addresses["x"] != spread["x"].data_ptr()

    def test_results_of_one_run_are_not_those_of_the_next(self, device: torch.device) -> None:
        held, one, other = session(device), given(2), given(2)
        first = held.run(one)
        held.run(other)
        check(first, one, device)

    def test_what_does_not_fit(self, device: torch.device) -> None:
        held, inputs = session(device), given(2)
        with pytest.raises(EngineError, match=r"input x of shape \(17, 8\) is outside .*\(1, 8\) to \(16, 8\)"):
            held.run({**inputs, "x": torch.zeros(17, 8)})
        with pytest.raises(EngineError, match=r"input x is torch\.float32 and got torch\.float16"):
            held.run({**inputs, "x": inputs["x"].half()})
        with pytest.raises(EngineError, match="takes 2 inputs and got 1"):
            held.run(inputs["x"])
        with pytest.raises(EngineError, match=r"takes the inputs \['x', 'k'\] and got \['x', 'z'\]"):
            held.run({"x": inputs["x"], "z": inputs["k"]})
        check(held.run(inputs), inputs, device)

    def test_examples_have_the_shapes_that_the_engine_is_tuned_for(self, device: torch.device) -> None:
        examples = session(device).example_inputs()
        assert {name: (tuple(t.shape), t.dtype) for name, t in examples.items()} == {
            "x": ((4, 8), torch.float32),
            "k": ((4,), torch.int64),
        }
        assert float(examples["x"].std()) > 0.5
        assert session(device).example_inputs(2, {"k": (5,)})["x"].shape == (2, 8)
        assert session(device).example_inputs(2, {"k": (5,)})["k"].shape == (5,)
        with pytest.raises(EngineError, match=r"test\.engine has no input z, but x, k"):
            session(device).example_inputs(shapes={"z": (1,)})

    def test_placed_inputs_are_read_without_copies(self, device: torch.device) -> None:
        held, inputs = session(device), given(3)
        placed = held.placed(inputs)
        check(held.run(placed), inputs, device)
        assert all(held.context.addresses[name] == tensor.data_ptr() for name, tensor in placed.items())


def test_graphs_are_for_cuda() -> None:
    with pytest.raises(EngineError, match="there are no CUDA graphs on cpu"):
        session(CPU).run(given(2), cuda_graph=True)


def test_reasons_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    held = session(CPU)
    monkeypatch.setattr(held.context, "execute_async_v3", lambda _stream: False)
    with pytest.raises(EngineError, match=r"test\.engine could not be run: no reason given"):
        held.run(given(2))
    monkeypatch.setattr(held.context, "get_tensor_shape", lambda _name: (-1, 5))
    with pytest.raises(EngineError, match="depends on the data"):
        held.run(given(2))
    monkeypatch.setattr(held.engine, "get_tensor_dtype", lambda _name: SimpleNamespace(name="FP4"))
    with pytest.raises(EngineError, match="TensorRT's type FP4, which torch has not"):
        held.run(given(2))
    monkeypatch.setattr(held.engine, "create_execution_context", lambda: None)
    with pytest.raises(EngineError, match="no execution context"):
        Session(TRT, held.engine, CPU, "test.engine")  # type: ignore[arg-type]


@pytest.mark.gpu
class TestCuda:
    """Streams and graphs."""

    def test_it_works_on_a_stream_of_its_own_in_the_callers_order(self) -> None:
        held, inputs = session(CUDA), given(4, CUDA)
        x = inputs["x"].clone()
        torch.cuda._sleep(50_000_000)  # what the caller queued before is still running
        x.mul_(2)
        found = held.run({**inputs, "x": x})["y"] + 0  # queued behind the run
        x.zero_()
        check({"y": found, "n": inputs["k"] * 2}, {**inputs, "x": inputs["x"] * 2}, CUDA)
        assert held.stream is not None
        assert held.context.calls == [held.stream.cuda_stream]
        assert held.stream.cuda_stream != torch.cuda.current_stream().cuda_stream

    def test_a_stream_of_the_callers_is_waited_for_too(self) -> None:
        held, inputs, side = session(CUDA), given(4, CUDA), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        held.run(inputs, cuda_graph=True)
        side.wait_stream(torch.cuda.current_stream())
        kept = []
        with torch.cuda.stream(side):
            for cuda_graph in (False, True):
                x = inputs["x"].clone()
                torch.cuda._sleep(50_000_000)
                x.mul_(3)
                kept.append(held.run({**inputs, "x": x}, cuda_graph=cuda_graph)["y"] + 0)
                x.zero_()
        side.synchronize()
        for found in kept:
            check({"y": found, "n": inputs["k"] * 2}, {**inputs, "x": inputs["x"] * 3}, CUDA)

    def test_threads_wait_for_each_other(self) -> None:
        held = session(CUDA)
        work = [given(1 + index % 5, CUDA) for index in range(40)]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda one: held.run(one, cuda_graph=len(one["k"]) % 2 == 0), work))
        torch.cuda.synchronize()
        for results, inputs in zip(found, work, strict=True):
            check(results, inputs, CUDA)

    def test_benchmark_replays_graphs(self) -> None:
        engines: Any = {name: SimpleNamespace(_session=session(CUDA)) for name in ("int8", "fp16")}
        found = benchmark(engines, given(8, CUDA), warmup=3, iterations=30, cuda_graph=True)
        assert {name: (len(one.milliseconds), one.batch) for name, one in found.latencies.items()} == {
            "int8": (30, 8),
            "fp16": (30, 8),
        }
        assert all(0 < one.percentile(50) <= one.percentile(99) for one in found.latencies.values())
        # Once to warm up and once to be recorded; all others were replays.
        assert [len(context.calls) for context in engines["int8"]._session.engine.contexts] == [0, 2]

    def test_a_graph_is_recorded_once_for_each_shape_and_replayed(self) -> None:
        held = session(CUDA)
        engine: Any = held.engine
        kept = []
        for batch in (2, 4, 2, 4, 2):
            inputs = given(batch, CUDA)
            kept.append((held.run(inputs, cuda_graph=True), inputs))
        for found, inputs in kept:
            check(found, inputs, CUDA)
        runs = [len(context.calls) for context in engine.contexts]
        assert runs == [0, 2, 2]  # each graph's context: once to warm up, once to be recorded; replays call nothing
        check(held.run(kept[0][1]), kept[0][1], CUDA)

    def test_cpu_tensors_go_into_a_graph_too(self) -> None:
        held, inputs = session(CUDA), given(3)
        check(held.run(inputs, cuda_graph=True), inputs, CUDA)
        check(held.run(inputs, cuda_graph=True), inputs, CUDA)

    def test_old_graphs_make_room(self) -> None:
        held = session(CUDA)
        for batch in range(1, 13):
            held.run(given(batch), cuda_graph=True)
        assert len(held._graphs) == 8

    def test_events_time_the_work_and_not_the_launch(self) -> None:
        calls = {"short": lambda: torch.cuda._sleep(100_000), "long": lambda: torch.cuda._sleep(10_000_000)}
        found = measure(calls, warmup=1, iterations=25, device=CUDA)
        assert found["long"].median > 10 * found["short"].median


class TestLatency:
    """What is made of the times."""

    def test_percentiles_by_nearest_rank(self) -> None:
        times = Latency(tuple(float(t) for t in range(100, 0, -1)), batch=4)
        assert [times.percentile(p) for p in (1, 50, 90, 99, 100)] == [1, 50, 90, 99, 100]
        assert times.median == 50
        assert times.throughput == pytest.approx(4 * 1000 / 50.5)
        assert str(times) == "p50 50.000 ms, p90 90.000 ms, p99 99.000 ms, 79 samples/s"
        with pytest.raises(EngineError, match="no percentile 0"):
            times.percentile(0)

    def test_side_by_side(self) -> None:
        found = Timings({"int8": Latency((1.0,)), "fp32": Latency((4.0,))})
        assert found.speedup("int8", "fp32") == 4
        assert [line.split()[0] for line in str(found).splitlines()] == ["int8", "fp32"]
        assert str(found).splitlines()[0].endswith("4.00x")

    def test_engines_have_their_turns(self) -> None:
        order: list[str] = []
        runs = {name: lambda name=name: order.append(name) for name in "ab"}
        found = measure(runs, warmup=2, iterations=30, device=CPU, batch=3)  # type: ignore[arg-type]
        assert "".join(order) == "aabb" + "a" * 20 + "b" * 20 + "a" * 10 + "b" * 10
        assert {name: (len(latency.milliseconds), latency.batch) for name, latency in found.items()} == {
            "a": (30, 3),
            "b": (30, 3),
        }
        with pytest.raises(EngineError, match="time at least one"):
            measure(runs, warmup=0, iterations=0, device=CPU)  # type: ignore[arg-type]

    def test_benchmark_of_engines(self) -> None:
        engines: Any = {name: SimpleNamespace(_session=session(CPU)) for name in ("int8", "fp16")}
        found = benchmark(engines, warmup=1, iterations=3)
        assert {name: (len(one.milliseconds), one.batch) for name, one in found.latencies.items()} == {
            "int8": (3, 4),
            "fp16": (3, 4),
        }
        assert benchmark(engines, given(7), warmup=0, iterations=1).latencies["int8"].batch == 7
        with pytest.raises(EngineError, match="there is no engine to time"):
            benchmark({})
        assert trt_engine.Engine.benchmark.__doc__ is not None
