"""The page at `/`, in a real browser, and what it is allowed to do."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator

import httpx
import pytest

from model.tokenizer import Tokenizer
from service.engine.errors import EngineOverloadedError
from service.engine.request import FinishReason
from service.gateway.api_keys import KeyRing, keys_of_options
from tests.gateway.browser import Browser, find_browser
from tests.gateway.colours import colour, contrast, luminance
from tests.gateway.fake_engine import FakeEngine, hang, say, steps
from tests.gateway.server import GatewayServer, served_model, wait_until

STORY = ' there was a fox 🦊 who said "hello" & ran.'


@pytest.fixture(scope="module")
def shared_browser() -> Iterator[Browser]:
    with Browser(find_browser()) as browser:
        yield browser


@pytest.fixture
def browser(shared_browser: Browser, server: GatewayServer) -> Iterator[Browser]:
    """On the playground; the test fails where the page's console had something to say."""
    shared_browser.problems.clear()
    shared_browser.open(server.url + "/")
    shared_browser.wait_for("document.getElementById('model').textContent.includes('mosaic')")
    yield shared_browser
    assert shared_browser.problems == []


def finished(browser: Browser) -> None:
    browser.wait_for(
        "document.getElementById('finish').textContent != '–' && !document.getElementById('generate').disabled"
    )


def focus(browser: Browser, element_id: str) -> None:
    browser.js(f"document.getElementById('{element_id}').focus()")


def fill(browser: Browser, element_id: str, text: str) -> None:
    """Replaces what is in a field as a user would: by typing."""
    browser.js(f"document.getElementById('{element_id}').select()")
    browser.type(text)


def test_files_of_the_page_come_with_a_strict_policy(client: httpx.Client) -> None:
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    links = re.findall(r'(?:href|src)="([^"]+)"', page.text)
    assert set(links) == {"/static/icon.svg", "/static/style.css", "/static/playground.js"}
    for path in ("/", *links):
        answer = client.get(path)
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"<script>|\son\w+=|style=", page.text), "nothing inline"


def test_a_completion_appears_while_it_is_generated(browser: Browser, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(STORY)
    engine.script = say(ids, delay_s=0.03)
    browser.js("document.getElementById('generate').click()")
    browser.wait_for("document.getElementById('text').textContent.length > 0")
    partial = browser.text("text")
    assert STORY.startswith(partial)
    assert len(partial) < len(STORY)
    assert browser.js("document.getElementById('output').ariaBusy") == "true"
    finished(browser)
    assert browser.text("echo") + browser.text("text") == "Once upon a time" + STORY
    assert browser.text("finish") == "max tokens reached"
    assert browser.text("tokens") == str(len(ids))
    assert 5 < float(browser.text("rate")) < 40
    assert re.fullmatch(r"\d+ ms", browser.text("ttft"))
    assert browser.text("status") == "Finished: max tokens reached"
    assert browser.js("document.getElementById('output').ariaBusy") == "false"


def test_settings_are_sent_and_a_seed_can_be_used_again(browser: Browser, engine: FakeEngine) -> None:
    engine.script = say([5, 0], finish=FinishReason.STOP)
    fill(browser, "prompt", "It's <b>night</b>")
    fill(browser, "max-tokens", "7")
    browser.js(
        "for (const [id, value] of [['temperature', 0.3], ['top-p', 0.5]]) {"
        "  const input = document.getElementById(id); input.value = value;"
        "  input.dispatchEvent(new Event('input', {bubbles: true})); }"
    )
    browser.js("document.getElementById('generate').click()")
    finished(browser)
    first = engine.requests[0].sampling
    assert (first.max_tokens, first.temperature, first.top_p) == (7, 0.3, 0.5)
    assert browser.text("finish") == "end of text"
    assert browser.text("echo") == "It's <b>night</b>"
    assert browser.text("reuse") == str(first.seed)
    browser.js("document.getElementById('reuse').click()")
    browser.js("document.getElementById('generate').click()")
    wait_until(lambda: len(engine.requests) == 2, "the second request")
    assert engine.requests[1].sampling.seed == first.seed
    finished(browser)


def test_it_works_without_a_mouse(browser: Browser, engine: FakeEngine) -> None:
    engine.script = hang([5])
    focus(browser, "prompt")
    browser.press("Enter", ctrl=True)
    browser.wait_for("document.getElementById('text').textContent.length > 0")
    browser.press("Escape")
    finished(browser)
    assert browser.text("finish") == "stopped by you"
    wait_until(lambda: engine.aborted, "the engine to be freed")
    visited = []
    focus(browser, "prompt")
    for _ in range(9):
        browser.press("Tab")
        visited.append(browser.js("document.activeElement.id"))
        outline = browser.js("getComputedStyle(document.activeElement).outlineStyle")
        assert outline not in ("none", None), f"no visible focus on {visited[-1]}"
    assert visited[:5] == ["max-tokens", "temperature", "top-p", "seed", "generate"]
    assert {"output", "copy", "curl"} <= set(visited)


def test_the_stop_button_stops(browser: Browser, engine: FakeEngine) -> None:
    engine.script = hang([5])
    browser.js("document.getElementById('generate').click()")
    browser.wait_for("!document.getElementById('stop').disabled")
    wait_until(lambda: engine.running, "the request")
    browser.js("document.getElementById('stop').click()")
    wait_until(lambda: engine.aborted, "the engine to be freed")
    finished(browser)


def test_errors_are_shown(browser: Browser, engine: FakeEngine) -> None:
    engine.script = steps([5], FinishReason.ERROR)
    browser.js("document.getElementById('generate').click()")
    finished(browser)
    assert "the generation failed on the server" in browser.text("error")
    assert browser.text("text") != "", "what came before the failure stays"
    engine.script = steps(EngineOverloadedError("the queue is full"))
    browser.js("document.getElementById('generate').click()")
    browser.wait_for("document.getElementById('error').textContent.includes('queue is full')")
    finished(browser)
    engine.script = say([5])
    browser.js("document.getElementById('generate').click()")
    finished(browser)
    assert browser.js("document.getElementById('error').hidden")
    # The browser itself notes the 503 in its console; nothing else may be there.
    assert all("503" in problem for problem in browser.problems)
    browser.problems.clear()


def test_the_curl_command_does_the_same(browser: Browser, engine: FakeEngine, server: GatewayServer) -> None:
    fill(browser, "prompt", 'It\'s "late"\n$HOME `ls` 🦊')
    fill(browser, "seed", "42")
    command = shlex.split(browser.text("curl").replace("\\\n", ""))
    assert command[:3] == ["curl", "-N", f"{server.url}/v1/completions"]
    sent = json.loads(command[command.index("-d") + 1])
    assert (sent["prompt"], sent["seed"]) == ('It\'s "late"\n$HOME `ls` 🦊', 42)
    output = subprocess.run([*command, "-sS"], capture_output=True, text=True, timeout=60, check=True).stdout
    assert output.endswith("data: [DONE]\n\n")
    assert engine.requests[0].sampling.seed == 42


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_both_colour_schemes(browser: Browser, engine: FakeEngine, scheme: str) -> None:
    engine.script = say([5])
    browser.colours(scheme)
    browser.js("document.getElementById('generate').click()")
    finished(browser)
    grounds = {"echo": "output", "text": "output", "curl": "curl", "model": "body", "tokens": "body", "reuse": "body"}
    for element_id, ground in grounds.items():
        ratio = contrast(
            colour(browser, selector(element_id), "color"), colour(browser, selector(ground), "backgroundColor")
        )
        assert ratio >= 4.5, f"{element_id} has a contrast of {ratio:.1f} in the {scheme} scheme"
    primary = contrast(colour(browser, "#generate", "color"), colour(browser, "#generate", "backgroundColor"))
    assert primary >= 4.5
    is_dark = luminance(colour(browser, "body", "backgroundColor")) < 0.2
    assert is_dark == (scheme == "dark")


def test_a_server_with_keys_asks_for_one_and_the_tab_remembers_it(
    shared_browser: Browser, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    engine.script = say(tokenizer.encode(" was a fox"))
    secret = "sk-0123456789"
    keys = KeyRing(keys_of_options([secret]))
    is_asked = "document.getElementById('key').checkVisibility()"
    with GatewayServer(engine, served_model(tokenizer=tokenizer), keys=keys) as server:
        shared_browser.open(server.url + "/")
        shared_browser.wait_for(is_asked)
        assert "API key is needed" in shared_browser.js("document.getElementById('model').textContent")
        fill(shared_browser, "key", secret)
        shared_browser.js("document.getElementById('key').blur()")
        shared_browser.wait_for("document.getElementById('model').textContent.includes('mosaic')")
        shared_browser.js("document.getElementById('generate').click()")
        finished(shared_browser)
        assert shared_browser.js("document.getElementById('text').textContent") == " was a fox"
        page = shared_browser.js("document.body.textContent")
        assert secret not in page
        assert "Bearer $TESSERA_API_KEY" in page
        shared_browser.open(server.url + "/?again")
        shared_browser.wait_for("document.getElementById('model').textContent.includes('mosaic')")
        assert not engine.running
    # That a key is missing is all that the browser complained of.
    assert all("401" in problem for problem in shared_browser.problems)


def selector(element_id: str) -> str:
    return "body" if element_id == "body" else f"#{element_id}"
