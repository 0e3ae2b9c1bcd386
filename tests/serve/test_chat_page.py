"""The chat page in a real browser, where playwright and a Chromium are installed."""

import shutil

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from tests.serve.test_server import continued, running  # noqa: E402

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.long
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_chat_in_a_browser():
    """An answer streams in as text, whatever it spells; what is wrong is said."""
    with running() as (address, _), playwright.sync_playwright() as control:
        browser = control.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.fill("#temperature", "0")
        page.fill("#tokens", "9")
        page.fill("#text", "<b>hi")
        page.press("#text", "Enter")
        page.wait_for_selector(".note")
        assert page.text_content(".user") == "<b>hi"
        assert page.text_content(".assistant") == continued("[user]<b>hi[assistant]", 9)[0]
        page.fill("#tokens", "1000")
        page.fill("#text", "more")
        page.click("#send")
        assert "max_length" in page.wait_for_selector(".error").text_content()
        assert all(url.startswith(address) for url in asked)
        browser.close()
