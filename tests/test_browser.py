"""What people see: JupyterLab runs the quickstart in a headless Chromium, and nodes are clicked.

Needs a Chromium with its driver on the path; ``FXQ_REQUIRE_BROWSER=1`` makes a skip a failure. Nothing leaves the
machine: the server listens on localhost alone.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn
from urllib.request import urlopen

import pytest
from toys import bottleneck_net, image

import fxq
from fxq.drawing.viewer import page as write_page
from fxq.html import Html

ROOT = Path(__file__).resolve().parent.parent
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1500,1100",
)

pytestmark = [
    pytest.mark.browser,
    # Selenium leaves sockets to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


def unavailable(reason: str) -> NoReturn:
    if os.environ.get("FXQ_REQUIRE_BROWSER"):
        pytest.fail(f"FXQ_REQUIRE_BROWSER is set: {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A Chromium with an empty profile."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        unavailable("no Chromium with chromedriver here: apt-get install chromium chromium-driver")
    try:
        from selenium import webdriver
    except ImportError:
        unavailable("selenium is not installed; `make env` installs it")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (*QUIET, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    made.set_script_timeout(60)
    try:
        yield made
    finally:
        made.quit()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """JupyterLab on a copy of the notebooks: its address with the token, and the folder."""
    if shutil.which("jupyter-lab") is None and not Path(sys.executable).with_name("jupyter-lab").exists():
        unavailable("JupyterLab is not installed; `make env` installs it")
    folder = tmp_path_factory.mktemp("lab")
    shutil.copy(ROOT / "notebooks" / "01_quickstart.ipynb", folder)
    token, port = secrets.token_hex(16), free_port()
    state = tmp_path_factory.mktemp("state")
    homes = {f"JUPYTER_{kind}_DIR": str(state / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    homes |= {
        "JUPYTERLAB_SETTINGS_DIR": str(state / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(state / "workspaces"),
    }
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}"]
    command += ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    log = folder.parent / "lab.log"
    with log.open("w") as out:
        server = subprocess.Popen(
            command, stdout=out, stderr=out, env={**os.environ, **homes, "PYTHONPATH": path}, cwd=folder
        )
        try:
            wait(lambda: answers(f"http://127.0.0.1:{port}/api?token={token}"), 40, lambda: log.read_text()[-2000:])
            yield f"http://127.0.0.1:{port}/doc/tree/01_quickstart.ipynb?token={token}", folder
        finally:
            server.terminate()
            server.wait(20)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=2) as reply:
            return reply.status == 200
    except OSError:
        return False


def wait(until: Callable[[], Any], seconds: float, what: Callable[[], object] = lambda: "") -> Any:
    """What `until` gives as soon as it is true."""
    end = time.monotonic() + seconds
    while not (found := until()):
        if time.monotonic() > end:
            pytest.fail(f"waited {seconds} s in vain; {what()}")
        time.sleep(0.1)
    return found


def panel(browser: Any, view: str = ".fxq-view[data-live]") -> str:
    text: str = browser.execute_script(f"return document.querySelector('{view} .fxq-panel').innerText")
    return text


def click(browser: Any, element: Any) -> None:
    """A click of the mouse where the element is, after scrolling to it."""
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', inline: 'center'})", element)
    from selenium.webdriver import ActionChains

    ActionChains(browser).move_to_element(element).click().perform()


def visible(browser: Any, selector: str) -> list[Any]:
    return [e for e in browser.find_elements("css selector", selector) if e.is_displayed()]


def labelled(browser: Any, text: str, selector: str = ".fxq-item") -> Any:
    found = [e for e in visible(browser, selector) if text in e.text]
    assert found, f"nothing in sight says {text!r}"
    return found[0]


def errors(browser: Any) -> list[str]:
    logged = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    return [message for message in logged if "favicon" not in message]


@pytest.fixture
def page(browser: Any, tmp_path: Path) -> Any:
    """The browser on a page with a picture of a small network."""
    gm = fxq.quantize(bottleneck_net().eval(), [image(2, 3, 16, 16)], progress=False)
    fxq.view(gm, depth=0).to_html(tmp_path / "graph.html")
    browser.get((tmp_path / "graph.html").as_uri())
    wait(lambda: browser.find_elements("css selector", ".fxq-view[data-live]"), 10)
    return browser


COORDINATES = """
const seen = (e) => !e.closest("[display=none]");
return [...document.querySelectorAll(".fxq-stage svg [transform], .fxq-stage svg path[d]")].filter(seen)
    .map((e) => e.getAttribute("transform") || e.getAttribute("d"));
"""


def test_the_browser_draws_what_python_draws(page: Any) -> None:
    """The same sums on both sides: opened in the browser, and opened when drawn, are the same to a tenth of a pixel."""
    gm = fxq.quantize(bottleneck_net().eval(), [image(2, 3, 16, 16)], progress=False)
    page.execute_script("[...document.querySelectorAll('button')].find(b => b.textContent === 'open all').click()")
    opened = page.execute_script(COORDINATES)
    svg = fxq.view(gm, depth=99).to_svg()
    drawn = [a or b for a, b in re.findall(r' transform="([^"]*)"| d="([^"]*)"', svg)]
    assert len(opened) > 50
    assert sorted(opened) == sorted(drawn)
    page.execute_script("[...document.querySelectorAll('button')].find(b => b.textContent === 'close all').click()")
    closed = [a or b for a, b in re.findall(r' transform="([^"]*)"| d="([^"]*)"', fxq.view(gm, depth=0).to_svg())]
    assert sorted(page.execute_script(COORDINATES)) == sorted(closed)
    assert errors(page) == []


def test_boxes_open_nodes_tell_and_search_finds(page: Any) -> None:
    assert not [e for e in visible(page, ".fxq-item") if "residual add" in e.text]
    click(page, labelled(page, "+ blocks", ".fxq-shut"))
    click(page, labelled(page, "+ ", ".fxq-box .fxq-box .fxq-shut"))
    click(page, labelled(page, "residual add"))
    told = panel(page)
    assert "residual add blocks_0_add" in told
    assert "R2" in told
    assert "int8" in told
    assert "toys.py" in told
    assert len(page.find_elements("css selector", "path.fxq-hot")) > 1
    click(page, visible(page, ".fxq-title")[0])
    assert not [e for e in visible(page, ".fxq-item") if "residual add" in e.text]
    field = page.find_element("css selector", ".fxq-tools input")
    field.send_keys("blocks_1_add\n")
    assert "residual add blocks_1_add" in panel(page)
    assert [e.text for e in visible(page, ".fxq-selected") if "residual add" in e.text]
    assert page.find_element("css selector", ".fxq-hits").text.endswith("found")
    assert errors(page) == []


def test_the_slider_goes_through_the_pipeline(browser: Any, tmp_path: Path) -> None:
    steps = fxq.Steps()
    fxq.PassManager(instruments=[steps]).run(fxq.passes.PREPARE, fxq.trace(bottleneck_net(), image(2, 3, 16, 16)))
    steps.to_html(tmp_path / "steps.html")
    browser.get((tmp_path / "steps.html").as_uri())
    slider = wait(lambda: browser.find_elements("css selector", ".fxq-slider input"), 10)[0]
    assert f"1 of {len(steps)}: before the first pass" in browser.find_element("css selector", ".fxq-slider").text
    for _ in range(len(steps) - 1):
        slider.send_keys("\ue014")  # the right arrow
    assert (
        f"{len(steps)} of {len(steps)}: insert-quantizers" in browser.find_element("css selector", ".fxq-slider").text
    )
    assert len(visible(browser, ".fxq-view")) == 1
    click(browser, labelled(browser, "int8"))
    assert "added, after" in panel(browser, ".fxq-steps details:not([hidden]) .fxq-view")
    assert errors(browser) == []


def test_a_row_of_a_comparison_leads_to_its_node(browser: Any, tmp_path: Path) -> None:
    model, x = bottleneck_net().eval(), image(4, 3, 16, 16)
    comparison = fxq.compare(model, fxq.quantize(model, [x], progress=False), x)
    write_page("comparison", [Html(comparison._repr_html_())], tmp_path / "comparison.html")
    browser.get((tmp_path / "comparison.html").as_uri())
    wait(lambda: browser.find_elements("css selector", ".fxq-view[data-live]"), 10)
    row = comparison.drops(1)[0]
    click(browser, browser.find_element("css selector", f"[data-node='{row.node}']"))
    told = panel(browser)
    assert row.node in told.splitlines()[0]
    assert f"{row.sqnr:.1f} dB, {row.drop:.1f} dB below what it reads" in told
    assert visible(browser, ".fxq-selected")
    assert errors(browser) == []


def test_jupyterlab_runs_the_quickstart_and_a_click_tells_of_the_node(browser: Any, lab: tuple[str, Path]) -> None:
    url, folder = lab
    path = folder / "01_quickstart.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    codes = ["".join(c["source"]) if c["cell_type"] == "code" else "" for c in notebook["cells"]]
    notebook["cells"] = notebook["cells"][: next(i for i, code in enumerate(codes) if "fxq.view(" in code) + 1]
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code" and "fxq.view(" not in "".join(cell["source"]):
            cell["outputs"] = []
    path.write_text(json.dumps(notebook), encoding="utf-8")
    browser.get(url)
    # As saved, and not trusted: scripts are taken out, and the still picture stands.
    image_ = ".jp-OutputArea img.fxq-still"
    still = wait(lambda: browser.find_elements("css selector", image_), 40, lambda: browser.title)[0]
    wait(lambda: browser.execute_script("return arguments[0].naturalHeight", still) > 400, 10)
    assert browser.find_elements("css selector", ".fxq-view[data-live]") == []
    run = "[data-command='notebook:restart-run-all']"
    click(browser, wait(lambda: visible(browser, run), 20)[0])
    accept = "dialog .jp-mod-accept, .jp-Dialog .jp-mod-accept"
    click(browser, wait(lambda: visible(browser, accept), 15)[0])
    live = ".jp-OutputArea .fxq-view[data-live]"
    found = wait(lambda: browser.find_elements("css selector", live), 180, lambda: errors(browser))[0]
    browser.execute_script("arguments[0].scrollIntoView()", found)
    click(browser, labelled(browser, "conv2d", f"{live} .fxq-item"))
    told = panel(browser, live)
    assert re.search(r"shape\s+\[\d+, \d+, \d+, \d+\]", told)
    assert re.search(r"int8 per-tensor mse, scale \d", told)
    assert "R20" in told
    assert "conv1 (Conv2d)" in told
    # JupyterLab's own styles, which set terms beside each other, must not reach into the panel.
    lefts = "return [...document.querySelectorAll(arguments[0])].map((e) => e.getBoundingClientRect().left)"
    assert len(set(browser.execute_script(lefts, f"{live} .fxq-panel :is(dt, dd)"))) == 1
