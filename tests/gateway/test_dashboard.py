"""The page at `/dashboard`, in a real browser, while requests run through an engine that really schedules."""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Iterator
from itertools import combinations

import httpx
import pytest

from service.gateway.pages import STATIC
from tests.gateway.browser import Browser, find_browser
from tests.gateway.colours import colour, contrast, luminance
from tests.gateway.engine_server import CountingRunner, serving
from tests.gateway.fake_engine import FakeEngine
from tests.gateway.server import wait_until

CHARTS = ["ttft", "itl", "phases", "tokens", "requests", "batch", "e2e", "busy", "usage"]


@pytest.fixture(scope="module")
def loaded() -> Iterator[httpx.Client]:
    """A client of a server that is busy: more requests than may run at the same time."""
    is_over = threading.Event()
    with serving(CountingRunner(lambda: time.sleep(0.005)), max_num_seqs=2) as client:

        def keep_busy() -> None:
            body = {"prompt": [1, 2, 3], "max_tokens": 20, "ignore_eos": True}
            while not is_over.is_set():
                client.post("/v1/completions", json=body)

        threads = [threading.Thread(target=keep_busy) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            yield client
        finally:
            is_over.set()
            for thread in threads:
                thread.join()


@pytest.fixture(scope="module")
def browser(loaded: httpx.Client) -> Iterator[Browser]:
    with Browser(find_browser()) as browser:
        browser.open(f"{loaded.base_url}/dashboard")
        browser.wait_for("document.querySelector('#tokens path.line')?.getAttribute('d').includes('L')")
        yield browser
        assert browser.problems == []


def test_files_of_the_page_come_with_a_strict_policy(loaded: httpx.Client) -> None:
    page = loaded.get("/dashboard")
    links = set(re.findall(r'(?:href|src)="(/static/[^"]+)"', page.text))
    assert {"/static/dashboard.js", "/static/dashboard.css", "/static/style.css"} <= links
    imported = {f"/static/{name}" for path in STATIC.glob("*.js") for name in imports(path.read_text())}
    assert len(imported) == 3
    for path in ("/dashboard", *(links | imported)):
        answer = loaded.get(path)
        assert answer.status_code == 200, path
        assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r"<script>|\son\w+=|style=|https?://", page.text), "nothing inline, nothing from elsewhere"


def imports(script: str) -> list[str]:
    return re.findall(r'from "\./([^"]+)"', script)


def test_it_shows_what_the_server_does(browser: Browser) -> None:
    browser.wait_for("document.getElementById('vital-requests').textContent.includes('2 running')")
    assert browser.text("health") == "Healthy"
    assert "mosaic" in browser.text("model")
    tokens = browser.js("document.querySelector('#vital-tokens .value').firstChild.textContent")
    # Two at a time, 5 ms and more a step.
    assert 20 < float(tokens.replace(",", "")) <= 400
    assert re.fullmatch(r"[\d.]+ m?s", browser.js("document.querySelector('#vital-ttft .value').textContent"))
    row = browser.js("[...document.querySelector('#replicas tbody tr').children].map((cell) => cell.textContent)")
    assert row[:2] == ["0", "2"]
    assert browser.js("[...document.querySelectorAll('.chart')].map((chart) => chart.id)") == CHARTS
    for chart in CHARTS:
        assert browser.js(f"document.querySelectorAll('#{chart} path.line, #{chart} .area').length") >= 1
        assert "NaN" not in browser.js(f"document.getElementById('{chart}').innerHTML")
        assert "Nothing yet" not in browser.text(chart)


def test_memory_is_drawn_tile_by_tile(browser: Browser) -> None:
    browser.wait_for("document.querySelector('.mosaic h3')?.textContent.match(/ [1-9]\\d* of 64 blocks used/)")
    colours = browser.js(
        "(() => { const canvas = document.querySelector('.mosaic canvas');"
        "const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;"
        "const found = new Set(); for (let i = 0; i < data.length; i += 4)"
        "  if (data[i + 3] === 255) found.add(`${data[i]} ${data[i + 1]} ${data[i + 2]}`);"
        "return found.size; })()"
    )
    assert colours >= 2, "free tiles and held ones"
    assert "of the memory" in browser.js("document.querySelector('.mosaic canvas').ariaLabel")


def test_it_goes_on_by_itself(browser: Browser) -> None:
    count = "document.querySelector('#requests path.line').getAttribute('d').split('L').length"
    before = browser.js(count)
    browser.wait_for(f"{count} > {before}")


def test_it_works_without_a_mouse_and_without_seeing(browser: Browser) -> None:
    browser.js("document.querySelector('nav a:last-child').focus()")
    browser.press("Tab")
    assert browser.js("document.activeElement === document.querySelector('#ttft > svg')")
    assert browser.js("getComputedStyle(document.activeElement).outlineStyle") != "none"
    browser.press("ArrowLeft")
    assert re.match(
        r"\d\d:\d\d:\d\d: p50 .*, p90 .*, p99 ", browser.js("document.querySelector('#ttft [role=status]').textContent")
    )
    assert browser.js("document.querySelectorAll('#ttft .cursor').length") == 1
    browser.js("document.querySelector('#ttft details').open = true")
    browser.wait_for("document.querySelectorAll('#ttft tbody tr').length > 1")
    cells = browser.js("[...document.querySelector('#ttft tbody tr').children].map((cell) => cell.textContent)")
    assert len(cells) == 4
    assert all(re.fullmatch(r"[\d.]+ m?s", cell) for cell in cells[1:])
    browser.js("document.querySelector('#ttft details').open = false")
    css = "".join(path.read_text() for path in STATIC.glob("dashboard.css"))
    assert not re.search(r"animation|transition", css), "nothing moves but the data"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_in_both_colour_schemes(browser: Browser, scheme: str) -> None:
    browser.colours(scheme)
    for selector, ground in (
        ("#model", "body"),
        ("#health", "#health"),
        ("#vitals dt", "#vitals > div"),
        ("#vitals .value", "#vitals > div"),
        (".legend b", ".chart"),
        (".chart .unit", ".chart"),
        ("thead th", "body"),
        ("fieldset input:checked + span", "fieldset input:checked + span"),
    ):
        ratio = contrast(colour(browser, selector, "color"), colour(browser, ground, "backgroundColor"))
        assert ratio >= 4.5, f"{selector} has a contrast of {ratio:.1f} in the {scheme} scheme"
    for series in range(1, 4):
        stroke = colour(browser, f"#ttft .line.s{series}", "stroke")
        assert contrast(stroke, colour(browser, ".chart", "backgroundColor")) >= 3
    assert (luminance(colour(browser, "body", "backgroundColor")) < 0.2) == (scheme == "dark")
    phases = [colour(browser, f"#phases .area.f{series}", "fill") for series in range(1, 6)]
    for one, other in combinations(phases, 2):
        assert math.dist(one, other) > 0.2, "two phases look alike"


@pytest.mark.parametrize("width", [1400, 400])
def test_it_fits_any_width(browser: Browser, width: int) -> None:
    browser.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    browser.js("dispatchEvent(new Event('resize'))")
    assert browser.js("document.documentElement.scrollWidth <= innerWidth")


def test_data_says_when_the_engine_is_silent(client: httpx.Client, engine: FakeEngine) -> None:
    engine.snapshots = ConnectionError("gone")
    body = client.get("/dashboard/data").json()
    assert (body["is_up"], body["replicas"], body["is_draining"]) == (False, [], False)


def test_samples_are_sent_once(client: httpx.Client) -> None:
    wait_until(lambda: client.get("/dashboard/data").json()["samples"], "a sample")
    newest = client.get("/dashboard/data").json()["samples"][-1]["number"]
    assert all(s["number"] > newest for s in client.get(f"/dashboard/data?after={newest}").json()["samples"])
    refused = client.get("/dashboard/data?after=-1")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "after")
