"""The page in a real Chromium: load, send, stream, watch the block, switch modes, stop; on a phone and by keyboard."""

import logging
import shutil

import pytest

from tests.server.worlds import serving, tiny_text_model
from trimode.server.keys import ApiKeys

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.skipif(
        CHROMIUM is None, reason="no Chromium on this machine (Debian and Ubuntu: apt install chromium)"
    ),
    # a browser's start and end leave sockets of playwright's own behind
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--disable-sync",
    "--disable-dev-shm-usage",
]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """A page of the server's, watched: no error in its console, nothing asked of anybody else."""
    page = browser.new_page(viewport={"width": 1100, "height": 700})
    faults, foreign = [], []
    page.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: faults.append(str(e)))
    page.on("request", lambda r: None if r.url.startswith((server[0], "data:")) else foreign.append(r.url))
    page.goto(server[0])
    sync_api.expect(page.locator("#model")).to_have_text("tiny")
    yield page
    page.close()
    assert faults == []
    assert foreign == []


def ask(page, text, mode=None, length=12):
    if mode is not None:
        page.select_option("#mode", mode)
    page.fill("#length", str(length))
    page.fill("#prompt", text)
    page.click("#send")


def done(page):
    sync_api.expect(page.locator("#status")).to_have_text("Done.", timeout=30_000)


WATCH = """() => { const seen = new Set();
new MutationObserver(() => document.querySelectorAll(".canvas b, .final span").forEach(
  e => e.className.split(" ").forEach(name => seen.add(name)))).observe(document.body, {subtree: true, childList: true});
return seen; }"""


@pytest.mark.parametrize(
    ("mode", "states"), [("self_spec", {"drafted", "rejected"}), ("diffusion", {"masked", "drafted", "accepted"})]
)
def test_the_block_is_shown_as_it_is_filled(page, mode, states):
    seen = page.evaluate_handle(WATCH)
    ask(page, "Hello", mode=mode, length=30)
    done(page)
    assert states <= set(seen.evaluate("s => [...s]"))


def test_an_answer_streams_beside_its_ar_twin_with_what_both_cost(page, model):
    ask(page, "Hello", mode="self_spec")
    done(page)
    expected = model.generate([{"role": "user", "content": "Hello"}], mode="ar", max_new_tokens=12)
    answers = page.locator(".answer")
    assert answers.count() == 2
    assert [answers.nth(i).get_attribute("data-mode") for i in range(2)] == ["self_spec", "ar"]
    for i in range(2):
        assert answers.nth(i).locator(".final").text_content() == expected.text
        assert "tokens/forward" in answers.nth(i).locator(".figures").inner_text()
        assert "tokens/s" in answers.nth(i).locator(".figures").inner_text()
    assert "1.00 tokens/forward" in answers.nth(1).locator(".figures").inner_text() or expected.stats.decode_tpf != 1


def test_modes_can_be_switched_and_the_chat_goes_on(page, model):
    ask(page, "One", mode="diffusion")
    done(page)
    page.uncheck("#twin")
    ask(page, "Two", mode="ar")
    done(page)
    first = page.locator(".answer").first.locator(".final").text_content()
    chat = [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "Two"},
    ]
    expected = model.generate(chat, mode="ar", max_new_tokens=12).text
    assert page.locator(".answer").last.locator(".final").text_content() == expected
    page.click("#clear")
    assert page.locator(".answer").count() == 0


def test_an_answer_can_be_stopped_and_the_server_notices(page, server):
    for how in ("click", "Escape"):
        ask(page, "Hello", mode="ar", length=1900)
        sync_api.expect(page.locator(".final").last).not_to_be_empty(timeout=20_000)
        page.click("#stop") if how == "click" else page.keyboard.press("Escape")
        sync_api.expect(page.locator("#status")).to_have_text("Stopped.", timeout=10_000)
        # a browser may read on for a while, in the hope of using the connection again
        for _ in range(500):
            if server[1].num_calls == 0:
                break
            page.wait_for_timeout(20)
        assert server[1].num_calls == 0
    assert page.locator("#send").is_enabled()


def test_it_works_by_keyboard_alone(page):
    page.keyboard.type("Hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("there")
    assert page.input_value("#prompt") == "Hello\nthere"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "mode"
    page.keyboard.press("a")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    done(page)
    assert page.locator(".user").text_content() == "Hello\nthere"
    assert page.evaluate("document.activeElement.id") == "prompt"


def test_it_fits_a_phone(page):
    page.set_viewport_size({"width": 360, "height": 640})
    ask(page, "A" * 200 + " long words", mode="diffusion", length=20)
    done(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    box = page.locator("#send").bounding_box()
    assert box["height"] >= 40
    assert box["y"] + box["height"] <= 640


def test_what_people_write_is_shown_as_text(page):
    ask(page, "<img src=x onerror=alert(1)><script>alert(2)</script>", length=2)
    done(page)
    assert page.locator("main img, main script").count() == 0
    assert "<img src=x" in page.locator(".user").text_content()


def test_a_refusal_is_shown(browser, server):
    page = browser.new_page()
    page.goto(server[0])
    sync_api.expect(page.locator("#model")).to_have_text("tiny")
    ask(page, "word " * 3000, length=5)
    sync_api.expect(page.locator(".fault")).to_contain_text("2,048", timeout=20_000)
    page.close()


def test_a_key_is_asked_for_where_one_is_needed(browser):
    logging.getLogger("asyncio").disabled = True
    with serving(tiny_text_model(), keys=ApiKeys(["sesame"])) as (url, _):
        page = browser.new_page()
        page.goto(url)
        sync_api.expect(page.locator("#key")).to_be_visible()
        page.fill("#key", "sesame")
        page.press("#key", "Tab")
        sync_api.expect(page.locator("#model")).to_have_text("tiny")
        ask(page, "Hello", length=3)
        done(page)
        page.close()
    logging.getLogger("asyncio").disabled = False
