"""The conversation: streams, stops, is asked again, is kept, and shows nothing but text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.console_server import ANSWER, ConsoleServer, console_server
from support.pages import OpenPage

from shardmesh.errors import BusyError
from shardmesh.web.errors import body_of

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.processes, pytest.mark.browser]

DONE = ".message.answer:not([aria-busy]) .answer-meta b"
LONG = "word " * 3000


def ask(page: Page, words: str) -> None:
    page.wait_for_selector("#model option[value='fairy tales']", state="attached")
    page.fill("#prompt", words)
    page.keyboard.press("Enter")


def test_a_prompt_streams(four: ConsoleServer, open_page: OpenPage) -> None:
    page = open_page(four.url)
    ask(page, "Tell me of the king.")
    page.wait_for_selector(".message.answer[aria-busy] .caret")
    page.wait_for_selector(DONE)
    answer = page.locator(".message.answer .text")
    assert "three daughters" in answer.inner_text()
    assert answer.locator("strong").inner_text() == "three daughters"
    assert answer.locator("ol li").count() == 3
    meta = page.locator(".answer-meta").inner_text()
    assert "tokens/s" in meta
    assert "to the first token" in meta
    assert f"{len(ANSWER.split(' '))} tokens" in meta
    assert "over 00000000" in meta, "which replicas served it"
    (asked,) = four.call(lambda mesh: list(mesh.asked))
    assert asked["messages"] == [{"role": "user", "content": "Tell me of the king."}]
    assert (asked["model"], asked["stream"]) == ("fairy tales", True)


def test_stop_regenerate_and_edit(four: ConsoleServer, open_page: OpenPage) -> None:
    four.call(lambda mesh: setattr(mesh, "answer", LONG))
    page = open_page(four.url)
    ask(page, "Go on and on.")
    page.wait_for_selector(".message.answer .text:has-text('word')")
    page.click("#stop")
    page.wait_for_selector("text=stopped by you")
    page.wait_for_selector("#send:not([hidden])")
    four.call(lambda mesh: setattr(mesh, "answer", "another answer"))
    page.click("[aria-label='Answer again']")
    page.wait_for_selector(".message.answer .text:has-text('another answer')")
    assert page.locator(".message.answer").count() == 1
    page.hover(".message.asked")
    page.click("[aria-label='Edit and ask again']")
    assert page.locator("#prompt").input_value() == "Go on and on."
    assert page.locator(".message").count() == 0


def test_settings_reach_the_gateway(four: ConsoleServer, open_page: OpenPage) -> None:
    page = open_page(four.url)
    page.click("#chat-settings-toggle")
    page.fill("text=System prompt >> textarea", "You are a raven.")
    page.fill("text=Temperature >> input", "0.2")
    page.fill("text=Seed >> input", "7")
    page.fill("text=Tokens at most >> input", "33")
    page.keyboard.press("Tab")
    ask(page, "Hello")
    page.wait_for_selector(DONE)
    (asked,) = four.call(lambda mesh: list(mesh.asked))
    assert asked["messages"][0] == {"role": "system", "content": "You are a raven."}
    assert (asked["temperature"], asked["seed"], asked["max_tokens"]) == (0.2, 7, 33)


def test_a_model_without_a_template_continues_the_text(
    four: ConsoleServer, open_page: OpenPage
) -> None:
    four.call(lambda mesh: setattr(mesh, "answer", "no template"))
    page = open_page(four.url)
    ask(page, "Once upon a time")
    page.wait_for_selector("text=it continues your text")
    page.wait_for_selector(DONE)
    asked = four.call(lambda mesh: list(mesh.asked))
    assert asked[-1]["prompt"] == "Once upon a time"


def test_conversations_are_kept_in_the_browser(four: ConsoleServer, open_page: OpenPage) -> None:
    page = open_page(four.url)
    ask(page, "The first question")
    page.wait_for_selector(DONE)
    page.click("#conversation-new")
    ask(page, "The second question")
    page.wait_for_selector(DONE)
    page.reload()
    page.click("#conversations-toggle")
    titles = page.locator(".conversation b").all_inner_texts()
    assert titles == ["The second question", "The first question"]
    page.click(".conversation >> text=The first question")
    assert "three daughters" in page.locator(".message.answer").inner_text()
    page.click("#conversations-toggle")
    page.click("[aria-label='Delete “The second question”']")
    page.reload()
    page.click("#conversations-toggle")
    assert page.locator(".conversation b").all_inner_texts() == ["The first question"]


def test_an_error_is_a_sentence(four: ConsoleServer, open_page: OpenPage) -> None:
    page = open_page(four.url)
    error = body_of(BusyError("no room now", next_step="try again"))
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=429, json=error))
    ask(page, "Hello")
    page.wait_for_selector(".answer-note.bad")
    told = page.locator(".answer-note.bad").inner_text()
    assert told == "No room now. Next step: try again"
    page.unroute("**/v1/chat/completions")
    page.click("[aria-label='Answer again']")
    page.wait_for_selector(DONE)


@pytest.mark.parametrize("width", [1440, 390])
def test_a_long_word_in_an_error_widens_nothing_and_is_seen(
    four: ConsoleServer, open_page: OpenPage, width: int
) -> None:
    page = open_page(four.url, width=width)
    if width < 800:
        page.click(".sections >> text=Chat")
    four.call(lambda mesh: setattr(mesh, "answer", "A line of the answer.\n\n" * 30))
    ask(page, "First a long one")
    page.wait_for_selector(DONE)
    error = body_of(BusyError(f"{'12D3KooW' * 12} cannot be reached. " * 5, next_step="try again"))
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=429, json=error))
    ask(page, "Hello")
    note = page.locator(".answer-note.bad")
    note.wait_for()
    page.wait_for_function(
        """() => {
            const log = document.querySelector(".messages").getBoundingClientRect();
            const note = document.querySelector(".answer-note.bad").getBoundingClientRect();
            return note.bottom <= log.bottom && note.right <= log.right;
        }"""
    )


def test_a_missing_token_is_asked_for(four: ConsoleServer, open_page: OpenPage) -> None:
    page = open_page(four.url)
    error = {"error": {"message": "a token is needed"}}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=401, json=error))
    ask(page, "Hello")
    page.wait_for_selector("#token-dialog[open]")
    page.fill("#token-input", "secret ü")
    with page.expect_websocket() as sockets:
        page.click("text=Use this token")
    page.wait_for_selector("#live[data-state=live]")
    assert sockets.value.url.endswith("/ws")
    assert page.evaluate("import('./static/js/api.js').then(api => api.socketProtocols())") == [
        "shardmesh",
        "bearer.c2VjcmV0IMO8",
    ]


def test_a_token_that_may_not_look_is_told_so(browser: Browser) -> None:
    tokens = [f"bot/inference:{'a' * 20}", f"eye/read:{'b' * 20}"]
    with console_server(tokens) as server:
        server.call(lambda mesh: mesh.add(0, 1, 2, 3))
        page = browser.new_page()
        page.goto(server.url)
        page.fill("#token-dialog[open] #token-input", "a" * 20)
        page.click("text=Use this token")
        page.wait_for_selector("#token-dialog[open] >> text=with the right “read”")
        assert page.locator("#live").inner_text() == "token needed"
        page.fill("#token-input", "b" * 20)
        page.click("text=Use this token")
        page.wait_for_selector("#live[data-state=live]")
        ask(page, "Hello")
        page.wait_for_selector(".answer-note.bad >> text=it lacks the right `inference`")
        page.close()


HOSTILE = (
    "<script>window.harmed = 1</script>",
    "<img src=x onerror='window.harmed = 1'>",
    "[click](javascript:window.harmed=1)",
    "[click](data:text/html,<script>window.harmed=1</script>)",
    "![x](javascript:window.harmed=1)",
    "![a picture](http://elsewhere.invalid/track.png)",
    "<svg/onload=window.harmed=1>",
    "[a](vbscript:x) [b](//elsewhere.invalid) [c](/v1/nodes)",
    "```html\n<script>window.harmed = 1</script>\n```",
    "| a | b |\n|---|---|\n| <b onmouseover=alert(1)>x</b> | [y](JaVaScRiPt:1) |",
    "`<iframe src=javascript:1>`",
)


def test_markdown_shows_text_and_does_nothing(four: ConsoleServer, open_page: OpenPage) -> None:
    page = open_page(four.url)
    page.evaluate(
        """async (texts) => {
          const { render } = await import("./static/js/markdown.js");
          const box = document.createElement("div");
          box.id = "hostile";
          for (const text of texts) box.append(render(text));
          document.body.append(box);
        }""",
        list(HOSTILE),
    )
    box = page.locator("#hostile")
    for tag in ("script", "img", "iframe", "[onerror]", "[onload]", "[onmouseover]"):
        assert box.locator(tag).count() == 0
    targets = box.locator("a").evaluate_all("links => links.map(link => link.protocol)")
    assert set(targets) <= {"http:", "https:", "mailto:"}
    assert page.evaluate("window.harmed") is None
    assert "<script>window.harmed = 1</script>" in box.inner_text()


def test_markdown_of_models(four: ConsoleServer, open_page: OpenPage) -> None:
    page = open_page(four.url)
    shown = page.evaluate(
        """async (texts) => {
          const { render } = await import("./static/js/markdown.js");
          return texts.map((text) => {
            const box = document.createElement("div");
            box.append(render(text));
            return box.innerHTML;
          });
        }""",
        [
            "a *b* **c** `d*e*` snake_case_name ~~f~~ \\*g\\*",
            "- one\n- two\n  - inner\n\n3. three\n4. four",
            "# Title\ntext\nmore\n\n---\n> said\n> he",
            "see https://example.org/a?b=1, and [it](https://example.org)",
            "**not closed and _neither",
            "```py\nx = 1\n\ny",
        ],
    )
    assert shown[0] == (
        "<p>a <em>b</em> <strong>c</strong> <code>d*e*</code> snake_case_name <s>f</s> *g*</p>"
    )
    assert shown[1] == (
        "<ul><li>one</li><li>two<ul><li>inner</li></ul></li></ul>"
        '<ol start="3"><li>three</li><li>four</li></ol>'
    )
    assert shown[2] == (
        '<h3 class="level-1">Title</h3><p>text\nmore</p><hr>'
        "<blockquote><p>said\nhe</p></blockquote>"
    )
    assert 'href="https://example.org/a?b=1"' in shown[3]
    assert shown[3].count("<a ") == 2
    assert shown[4] == "<p>**not closed and _neither</p>"
    assert "<code" in shown[5]
    assert "x = 1\n\ny" in shown[5]


def test_markdown_takes_linear_time(four: ConsoleServer, open_page: OpenPage) -> None:
    page = open_page(four.url)
    evil = ["*a" * 50_000, "[" * 50_000, "`" * 50_001, "> " * 20_000, "- " * 20_000, "|" * 50_000]
    evil += ["**" * 50_000, "_a_b" * 25_000, "](" * 50_000, "[a](" * 25_000, "a\n" * 50_000]
    page.set_default_timeout(60_000)
    page.evaluate(
        """async (texts) => {
          const { render } = await import("./static/js/markdown.js");
          for (const text of texts) render(text);
        }""",
        evil,
    )
