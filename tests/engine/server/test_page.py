"""The built-in page in a real browser, over a stand-in for the engine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fake_engine import REPLY, TINY, FakeEngine, Running, eventually, fake_llm, running, tokenizer

from engine.text.tokenizer import Tokenizer

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
    pytest.mark.xdist_group("browser"),
]
expect: Any = sync_api.expect
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync"]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield found
        found.close()


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine(delay=0.002)


@pytest.fixture(scope="module")
def server(engine: FakeEngine) -> Iterator[Running]:
    with running(engine, grace=0.5) as found:
        yield found


@pytest.fixture
def page(browser: Any, server: Running) -> Iterator[Any]:
    """The page, whose every complaint and whose every request elsewhere fails the test."""
    found = browser.new_page()
    complaints: list[str] = []
    found.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
    found.on("pageerror", lambda error: complaints.append(str(error)))
    elsewhere: list[str] = []
    found.on("request", lambda r: None if r.url.startswith((server.url, "data:")) else elsewhere.append(r.url))
    found.goto(server.url)
    yield found
    found.close()
    assert not elsewhere
    assert [text for text in complaints if "status of 4" not in text] == []  # refusals that the test asked for


def test_chat_by_keyboard_alone(page: Any, engine: FakeEngine):
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type("first line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second line")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("as long as allowed", timeout=20_000)
    assert page.locator(".user .text").inner_text() == "first line\nsecond line"
    text = page.locator(".assistant .text").text_content()
    assert text.startswith(REPLY * 3)  # characters of several tokens too
    assert page.locator(".assistant h2").inner_text().startswith("Assistant 256 tokens, ")
    # to the answer's tokens
    for _ in range(20):
        if page.evaluate_handle("() => document.activeElement").evaluate("e => !!e.closest('.assistant')"):
            break
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    tip = page.locator("#tip")
    expect(tip).to_be_visible()
    assert tip.locator("tr").count() == 5
    assert tip.locator(".chosen td").nth(0).inner_text() == "␣n" and "36.8 %" in tip.inner_text()
    expect(page.locator("#status")).to_contain_text("36.8 %")
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()
    assert engine.streams[-1].asked["session"]


def test_hovering_shows_probabilities(page: Any):
    page.fill("#prompt", "x")
    page.click("#send")
    expect(page.locator(".token").nth(20)).to_be_visible()
    tokens = page.locator(".token")
    assert "".join(tokens.nth(i).text_content() for i in range(4)) == "def naï"
    tokens.nth(3).hover()  # two tokens, one character
    expect(page.locator("#tip table")).to_have_count(2)
    assert "bytes:\\xc3" in page.locator("#tip").inner_text()
    page.mouse.move(1, 1)
    expect(page.locator("#tip")).to_be_hidden()
    shaded = "e => getComputedStyle(e).backgroundColor"
    assert tokens.nth(0).evaluate(shaded) != "rgba(0, 0, 0, 0)"
    page.uncheck("#shade")
    assert tokens.nth(0).evaluate(shaded) == "rgba(0, 0, 0, 0)"


def test_a_conversation_goes_on_and_begins_anew(page: Any, engine: FakeEngine):
    page.click("summary")
    page.fill("#max_tokens", "5")
    page.fill("#system", "be brief")
    lengths = []
    for text in ("one", "two"):
        page.fill("#prompt", text)
        page.keyboard.press("Enter")
        expect(page.locator("#stop")).to_be_disabled()
        expect(page.locator(".assistant h2").last).to_contain_text("as long as allowed")
        lengths.append(len(engine.streams[-1].prompt_token_ids))
    assert lengths[1] > lengths[0] + 5
    page.click("#new")
    expect(page.locator("article")).to_have_count(0)
    page.fill("#prompt", "one")
    page.keyboard.press("Enter")
    expect(page.locator(".assistant h2")).to_contain_text("as long as allowed")
    assert len(engine.streams[-1].prompt_token_ids) == lengths[0]


def test_stopping_aborts(page: Any, engine: FakeEngine):
    page.click("summary")
    page.fill("#max_tokens", "2000")
    for stop in (lambda: page.keyboard.press("Escape"), lambda: page.click("#stop")):
        page.click("#new")
        page.fill("#prompt", "x")
        page.keyboard.press("Enter")
        expect(page.locator(".assistant").last.locator(".token").nth(5)).to_be_visible()
        stop()
        expect(page.locator(".assistant h2").last).to_contain_text("stopped")
        eventually(lambda: engine.streams[-1].aborted)


def test_continuing_a_text(page: Any, engine: FakeEngine):
    page.select_option("#mode", "text")
    page.fill("#prompt", "import os\n")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("as long as allowed", timeout=20_000)
    assert page.locator(".assistant .text").text_content().startswith(REPLY)
    page.locator(".token").nth(1).hover()
    expect(page.locator("#tip tr")).to_have_count(6 - 1)


def test_gauges(page: Any, server: Running):
    expect(page.locator("#model")).to_have_text("tiny")
    expect(page.locator("#cache")).to_have_text("25 %")
    assert page.locator("#cache-meter").evaluate("e => e.value") == 0.25
    with httpx.stream("POST", server.url + "/v1/completions", json={"prompt": "x", "max_tokens": 2000, "stream": True}):
        expect(page.locator("#running")).to_have_text("1 of 8", timeout=5000)


def test_refusals_are_shown(page: Any):
    page.click("summary")
    page.fill("#max_tokens", "5000")
    page.fill("#prompt", "x")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("5000 tokens are to follow")
    expect(page.locator("#send")).to_be_enabled()


def prompt_ids(*messages: str) -> list[int]:
    """Token ids of a conversation that the user begins."""
    roles = ("user", "assistant")
    conversation = [{"role": roles[i % 2], "content": text} for i, text in enumerate(messages)]
    return tokenizer().encode(tokenizer().apply_chat_template(conversation), add_special_tokens=False)


def test_a_new_chat_has_nothing_of_the_answer_that_it_ends(page: Any, engine: FakeEngine):
    page.click("summary")
    page.fill("#max_tokens", "2000")
    page.fill("#prompt", "the old one")
    page.keyboard.press("Enter")
    expect(page.locator(".token").nth(5)).to_be_visible()
    page.click("#new")
    page.fill("#max_tokens", "3")
    expect(page.locator("#send")).to_be_enabled()
    assert page.input_value("#prompt") == ""
    page.fill("#prompt", "the new one")
    page.keyboard.press("Enter")
    expect(page.locator(".assistant h2")).to_contain_text("as long as allowed")
    assert engine.streams[-1].prompt_token_ids == prompt_ids("the new one")


def test_any_temperature_is_sent_with_settings_closed(page: Any, engine: FakeEngine):
    page.click("summary")
    for name, value in {"temperature": "0.77", "top_p": "0.333", "max_tokens": "3", "seed": "12345"}.items():
        page.fill(f"#{name}", value)
    page.click("summary")
    page.fill("#prompt", "x")
    page.click("#send")
    expect(page.locator(".assistant h2")).to_contain_text("as long as allowed")
    params = engine.streams[-1].params
    assert (params.temperature, params.top_p, params.max_new_tokens, params.seed) == (0.77, 0.333, 3, 12345)


@pytest.mark.parametrize(("name", "wrong"), [("max_tokens", "0"), ("max_tokens", "1.5"), ("temperature", "-1")])
def test_a_wrong_setting_is_shown(page: Any, name: str, wrong: str):
    page.click("summary")
    page.fill(f"#{name}", wrong)
    page.click("summary")
    page.fill("#prompt", "x")
    page.click("#send")
    expect(page.locator(f"#{name}")).to_be_visible()
    expect(page.locator(f"#{name}")).to_be_focused()
    assert page.input_value("#prompt") == "x" and page.locator("article").count() == 0


def test_what_failed_can_be_sent_again(page: Any, engine: FakeEngine):
    page.click("summary")
    page.fill("#max_tokens", "5000")
    page.fill("#prompt", "a long message")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("maximum context length is 2048 tokens")
    assert page.input_value("#prompt") == "a long message"
    page.fill("#max_tokens", "3")
    page.click("#send")
    expect(page.locator(".assistant h2").last).to_contain_text("as long as allowed")
    assert engine.streams[-1].prompt_token_ids == prompt_ids("a long message")
    assert page.input_value("#prompt") == ""


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"status": 502, "body": "<html>bad gateway", "content_type": "text/html"}, "502"),
        ({"status": 200, "body": "", "content_type": "text/event-stream"}, "broke off"),
        (None, "the server does not answer"),
    ],
)
def test_failures_that_are_not_the_servers(browser: Any, server: Running, answer: dict[str, Any] | None, said: str):
    page = browser.new_page()
    page.route("**/v1/chat/completions", lambda r: r.fulfill(**answer) if answer else r.abort())
    page.goto(server.url)
    page.fill("#prompt", "once more")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text(said)
    assert page.input_value("#prompt") == "once more"
    page.close()


def test_the_tip_of_a_tapped_token_stays_while_tokens_come(browser: Any):
    with running(FakeEngine(delay=0.01), grace=0.2) as server:
        page = browser.new_page(viewport={"width": 375, "height": 667}, has_touch=True)
        page.goto(server.url)
        page.evaluate("() => { document.getElementById('max_tokens').value = 2000; }")
        page.fill("#prompt", "x")
        page.keyboard.press("Enter")
        expect(page.locator(".token").nth(130)).to_be_attached()  # it scrolls by now
        count = page.locator(".token").count()
        page.locator(".token").nth(count - 10).tap()
        expect(page.locator("#tip")).to_be_visible()
        expect(page.locator(".token").nth(count + 60)).to_be_attached()
        expect(page.locator("#tip")).to_be_visible()
        page.locator(".user .text").tap()
        expect(page.locator("#tip")).to_be_hidden()
        page.close()


@pytest.mark.parametrize("height", [667, 568])
def test_most_of_a_phone_is_the_conversation(browser: Any, height: int):
    with running(FakeEngine(delay=0.01), grace=0.2) as server:
        page = browser.new_page(viewport={"width": 375, "height": height})
        page.goto(server.url)
        room = "() => document.getElementById('log').clientHeight"
        assert page.evaluate(room) > height - 220
        page.fill("#prompt", "x")
        page.keyboard.press("Enter")
        expect(page.locator("#stop")).to_be_visible()
        assert page.evaluate(room) > height - 220
        page.close()


def test_without_a_chat_template_texts_are_continued(browser: Any):
    plain = Tokenizer(TINY)
    plain.chat_template = None
    with running(FakeEngine(), fake_llm(tokenizer=plain)) as server:
        page = browser.new_page()
        page.goto(server.url)
        expect(page.locator("#mode")).to_have_value("text")
        page.fill("#prompt", "import os")
        page.keyboard.press("Enter")
        expect(page.locator("#status")).to_have_text("as long as allowed", timeout=20_000)
        page.close()


def test_api_key(browser: Any):
    with running(FakeEngine(), api_key="k1") as server:
        page = browser.new_page()
        page.goto(server.url)
        page.fill("#prompt", "x")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("API key")
        page.click("summary")
        page.fill("#key", "k1")
        page.fill("#prompt", "x")
        page.click("#send")
        expect(page.locator("#status")).to_have_text("as long as allowed", timeout=20_000)
        page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_and_width(browser: Any, server: Running, scheme: str):
    """Text against its ground has at least 4.5 to 1 (WCAG AA), and nothing sticks out on a phone."""
    page = browser.new_page(color_scheme=scheme, viewport={"width": 360, "height": 700})
    page.goto(server.url)
    page.fill("#prompt", "x")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("as long as allowed", timeout=20_000)
    assert page.evaluate_handle("() => document.documentElement").evaluate("e => e.scrollWidth <= innerWidth")
    colours = """e => {
      const rgb = c => c.match(/[\\d.]+/g).map(Number);
      let ground = [255, 255, 255], layers = [];
      for (let n = e; n; n = n.parentElement) layers.unshift(rgb(getComputedStyle(n).backgroundColor));
      for (const [r, g, b, a = 1] of layers) ground = [r, g, b].map((v, i) => v * a + ground[i] * (1 - a));
      return [rgb(getComputedStyle(e).color).slice(0, 3), ground];
    }"""

    def luminance(colour: list[float]) -> float:
        parts = [v / 255 for v in colour]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return sum(weight * v for weight, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for selector in ("dt", "dd", "h1 small", "h1 a", ".user .text", ".token", "article h2", "#send", "#new", "summary"):
        ink, ground = page.locator(selector).first.evaluate(colours)
        high, low = sorted((luminance(ink), luminance(ground)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, (selector, ink, ground)
    page.close()
