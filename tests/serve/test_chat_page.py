"""The chat page in a real browser, where playwright and a Chromium are installed."""

import contextlib
import shutil
import time

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from tests.serve.examples import byte_engine  # noqa: E402
from tests.serve.test_server import continued, running  # noqa: E402

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed"),
]


@contextlib.contextmanager
def opened(engine=None):
    """(address, page) of a server's chat."""
    with running(engine) as (address, _), playwright.sync_playwright() as control:
        browser = control.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(address)
        page.fill("#temperature", "0")
        yield address, page
        browser.close()


def ask(page, text, num_tokens):
    page.fill("#tokens", str(num_tokens))
    page.fill("#text", text)
    page.press("#text", "Enter")


def test_a_chat_in_a_browser():
    """An answer streams in as text, whatever it spells; what is wrong is said."""
    with opened() as (address, page):
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.reload()
        page.fill("#temperature", "0")
        ask(page, "<b>hi", 9)
        page.wait_for_selector(".note")
        assert page.text_content(".user") == "<b>hi"
        assert page.text_content(".assistant") == continued("[user]<b>hi[assistant]", 9)[0]
        page.fill("#tokens", "1000")
        page.fill("#text", "more")
        page.click("#send")
        assert "max_length" in page.wait_for_selector(".error").text_content()
        assert asked and all(url.startswith(address) for url in asked)


def test_what_was_said_before_a_new_chat_is_not_part_of_it():
    """Nor the answer that was still coming."""
    engine = byte_engine()
    step = engine.step
    engine.step = lambda: time.sleep(0.02) or step()
    with opened(engine) as (_, page):
        bodies = []
        page.on("request", lambda request: bodies.append(request.post_data_json))
        ask(page, "long", 100)
        page.wait_for_selector(".assistant:not(:empty)")
        page.click("#new")
        page.wait_for_selector("#send:text-is('Send')")
        assert page.query_selector(".assistant") is None
        ask(page, "hi", 9)
        page.wait_for_selector(".note")
        assert bodies[-1]["messages"] == [{"role": "user", "content": "hi"}]
