"""What every test may use: golden texts, TensorRT on a CPU, the real data, fixed seeds."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import golden
import hypothesis
import pytest
import torch
import trt_cpu

# Warm-up of torch makes the first example slow, so no deadline; in CI the examples are the same on every run.
hypothesis.settings.register_profile("fxq", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("fxq")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-update", action="store_true", help="rewrite tests/golden instead of comparing with it")
    parser.addoption(
        "--tensorrt",
        choices=("cpu", "installed"),
        default="cpu",
        help="cpu: the builder that the tests download, whose log lists every kernel (default); "
        "installed: the tensorrt package of this environment, for `-m gpu`",
    )


def pytest_configure(config: pytest.Config) -> None:
    golden.settings.update = config.getoption("--golden-update")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what the fixtures imply, and skip what needs a device where there is none."""
    no_device = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "trt" in fixtures:
            item.add_marker(pytest.mark.trt)
        if "real_data" in fixtures:
            item.add_marker(pytest.mark.realdata)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_device)


def pytest_runtest_setup() -> None:
    """Seed torch before each test's fixtures, so that no test depends on the ones before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def trt(request: pytest.FixtureRequest) -> ModuleType:
    """TensorRT's Python module, able to build engines. Under FXQ_REQUIRE_TRT its absence is a failure."""
    if request.config.getoption("--tensorrt") == "installed":
        return pytest.importorskip("tensorrt")
    try:
        return trt_cpu.load()
    except trt_cpu.UnavailableError as error:
        if os.environ.get("FXQ_REQUIRE_TRT"):
            pytest.fail(f"FXQ_REQUIRE_TRT is set, and TensorRT is not available: {error}")
        pytest.skip(f"no TensorRT on this CPU: {error}")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with MNIST, CIFAR-10 and trained weights, from FXQ_DATA."""
    name = os.environ.get("FXQ_DATA")
    if not name:
        pytest.skip("FXQ_DATA is not set")
    folder = Path(name)
    if not folder.is_dir():
        pytest.fail(f"FXQ_DATA names {name}, which is no folder")
    return folder
