"""How long a picture takes: laid out and written by fxq, and painted, opened and closed by a browser.

    python benchmarks/view.py --repeat 3

Needs Chromium with chromedriver on the path, and selenium. The browser's own performance timeline tells when it first
painted the picture; "live" is when every node can be clicked. Opening and closing take everything at once: all modules.
The fastest of the runs counts, each in a new window.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networks
import torch
from selenium import webdriver
from torch import fx, nn

import fxq

ARGUMENTS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
             "--window-size=1400,1000")  # fmt: skip
PRESS = """
const done = arguments[1], wanted = arguments[0], start = performance.now();
[...document.querySelectorAll("button")].find((b) => b.textContent === wanted).click();
requestAnimationFrame(() => setTimeout(() => done(performance.now() - start)));
"""
SCROLL = """
const done = arguments[0], stage = document.querySelector(".fxq-stage"), frames = [];
let last = performance.now();
const step = (now) => {
  frames.push(now - last);
  last = now;
  stage.scrollTop += 120;
  if (frames.length < 40) requestAnimationFrame(step);
  else done(frames.slice(2).sort((a, b) => a - b)[Math.floor(38 * 0.95)]);
};
requestAnimationFrame(step);
"""


def converted(name: str, size: int) -> fx.GraphModule:
    """A torchvision model with seeded weights, quantized."""
    torch.manual_seed(0)
    model = networks.torchvision_models().get_model(name, weights=None).eval()
    return fxq.quantize(model, [torch.randn(2, 3, size, size)], progress=False)


def flat(count: int) -> fx.GraphModule:
    """A graph without modules: `count` operations, a skip around every seventh."""
    graph = fx.Graph()
    last = skip = graph.placeholder("x")
    for index in range(count):
        last = graph.call_function(torch.relu, (last,))
        if index % 7 == 6:
            last = skip = graph.call_function(torch.add, (last, skip))
    graph.output(last)
    return fx.GraphModule(nn.Module(), graph)


def browser(profile: Path) -> Any:
    """A new Chromium with an empty profile."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in (*ARGUMENTS, f"--user-data-dir={profile}"):
        options.add_argument(argument)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


def measured(gm: fx.GraphModule, folder: Path) -> dict[str, float]:
    """Milliseconds by step, and the page's size in kB."""
    start = time.perf_counter()
    text = fxq.view(gm).to_html(folder / "graph.html")
    python = (time.perf_counter() - start) * 1e3
    start = time.perf_counter()
    fxq.view(gm).to_svg()
    svg = (time.perf_counter() - start) * 1e3
    with tempfile.TemporaryDirectory(dir=folder) as profile:
        driver = browser(Path(profile))
        try:
            driver.get((folder / "graph.html").as_uri())
            entry = "performance.getEntriesByType('paint').find((e) => e.name === 'first-contentful-paint').startTime"
            paint = driver.execute_script(f"return {entry}")
            live = driver.execute_script(
                "return performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd"
            )
            assert driver.execute_script("return document.querySelectorAll('.fxq-view[data-live]').length") == 1
            opened = driver.execute_async_script(PRESS, "open all")
            scrolled = driver.execute_async_script(SCROLL)
            closed = driver.execute_async_script(PRESS, "close all")
        finally:
            driver.quit()
    return {
        "fxq.view and to_html": python,
        "fxq.view and to_svg": svg,
        "first paint": paint,
        "live": live,
        "open all": opened,
        "scroll, 95 % of frames": scrolled,
        "close all": closed,
        "kB": len(text) / 1e3,
    }


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    repeat = parser.parse_args().repeat
    makers: dict[str, Callable[[], fx.GraphModule]] = {
        "ResNet-50": lambda: converted("resnet50", 64),
        "ViT-B/16": lambda: converted("vit_b_16", 224),
        "2,286 operations without modules": lambda: flat(2000),
    }
    rows: list[tuple[str, int, dict[str, float]]] = []
    for name, make in makers.items():
        gm = make()
        with tempfile.TemporaryDirectory() as folder:
            runs = [measured(gm, Path(folder)) for _ in range(repeat)]
        best = {key: min(run[key] for run in runs) for key in runs[0]}
        rows.append((name, len(fxq.view(gm).sketch.items), best))
    steps = list(rows[0][2])
    print(f"| graph | nodes | {' | '.join(f'{s}, ms' if s != 'kB' else s for s in steps)} |")
    print("|---" * (len(steps) + 2) + "|")
    for name, nodes, best in rows:
        print(f"| {name} | {nodes} | {' | '.join(f'{best[s]:.0f}' for s in steps)} |")


if __name__ == "__main__":
    main()
