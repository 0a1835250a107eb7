"""What holds for the whole page: accessible, light and dark, small screens, nothing foreign."""

from __future__ import annotations

import random
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
from support.console_server import ConsoleServer, large_mesh
from support.pages import OpenPage, wait_until

from shardmesh.web.console_routes import static_files
from shardmesh.web.roster import Download
from shardmesh.web.state import changes, merged

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = [pytest.mark.processes, pytest.mark.browser]

SERIOUS = ("serious", "critical")


def faults(page: Page) -> list[str]:
    """What axe finds that is serious, as one line each."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    # The rules are given to the page through the debugger: its policy lets no script in otherwise.
    found = axe.run(page, options={"resultTypes": ["violations"]}).response["violations"]
    return [
        f"{fault['id']}: {node['html'][:200]} {node.get('failureSummary', '')[:300]}"
        for fault in found
        if fault["impact"] in SERIOUS
        for node in fault["nodes"][:3]
    ]


def make_lively(server: ConsoleServer) -> None:
    """Every state at once."""
    server.call(lambda mesh: mesh.add(0, 1, 2, 3, 4, 5, 6))
    server.call(lambda mesh: mesh.keep_busy(1))
    server.call(lambda mesh: mesh.report(5, shard_state="failed", error="no memory"))
    server.call(lambda mesh: mesh.report(6, answered=False, error="no answer in time"))
    server.call(lambda mesh: mesh.add(7, loaded=False))
    download = Download(name="shard-3.gguf", n_bytes=100, n_bytes_done=30, n_sources=1)
    server.call(lambda mesh: mesh.report(7, shard_state="absent", downloads=(download,)))


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (390, "dark")])
def test_axe_finds_no_serious_fault(
    server: ConsoleServer, open_page: OpenPage, width: int, scheme: str
) -> None:
    make_lively(server)
    page = open_page(server.url, width=width, scheme=scheme)
    page.wait_for_selector(".card[data-state=failed]")
    server.call(lambda mesh: mesh.lose(4))
    page.wait_for_selector(".card[data-state=offline]")
    page.wait_for_selector(".waterfall tbody tr", state="attached")
    views = ["Chain"] if width > 1000 else ["Chain", "Chat", "Events", "Models"]
    for view in views:
        page.click(f".sections >> text={view}")
        assert faults(page) == [], view
    if width < 1000:
        page.click(".sections >> text=Chat")
    page.fill("#prompt", "Tell me")
    page.keyboard.press("Enter")
    page.wait_for_selector(".message.answer:not([aria-busy]) .answer-meta b")
    page.click("#chat-settings-toggle")
    assert faults(page) == []
    page.click("#conversations-toggle")
    assert faults(page) == []
    if width < 1000:
        page.click(".sections >> text=Chain")
    page.click(".card[data-state=failed]")
    page.wait_for_selector("#node-dialog[open]")
    assert faults(page) == []


def test_axe_finds_no_serious_fault_in_a_large_mesh(
    server: ConsoleServer, open_page: OpenPage
) -> None:
    server.call(lambda mesh: mesh.place(large_mesh(20, 10)))
    page = open_page(server.url)
    wait_until(page, "document.querySelectorAll('.card[data-peer]').length === 200")
    assert faults(page) == []


def test_dark_follows_the_system_and_the_switch(four: ConsoleServer, open_page: OpenPage) -> None:
    def brightness(page: Page) -> int:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in colour[4:-1].split(","))

    page = open_page(four.url, scheme="dark")
    assert brightness(page) < 150
    page.emulate_media(color_scheme="light")
    assert brightness(page) > 600
    page.click("#theme")
    assert brightness(page) > 600
    page.click("#theme")
    assert brightness(page) < 150
    page.reload()
    assert brightness(page) < 150, "the choice is kept"
    assert page.get_attribute("#theme", "aria-label") == "Appearance: dark"


@pytest.mark.parametrize("view", ["Chain", "Chat", "Events", "Models"])
def test_a_phone_needs_no_sideways_scrolling(
    four: ConsoleServer, open_page: OpenPage, view: str
) -> None:
    page = open_page(four.url, width=390, height=844)
    page.wait_for_selector(".card[data-state=online]")
    page.click(f".sections >> text={view}")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    wide = page.evaluate(
        """() => [...document.querySelectorAll("main, main section, aside")].filter((e) =>
            e.offsetParent && e.scrollWidth > e.clientWidth + 1).map((e) => e.id)"""
    )
    assert wide == []


@pytest.mark.parametrize("width", [390, 320])
def test_what_is_missing_widens_no_chat_on_a_phone(
    server: ConsoleServer, open_page: OpenPage, width: int
) -> None:
    server.call(lambda mesh: mesh.add(0, 2, 3))
    page = open_page(server.url, width=width, height=844)
    page.click(".sections >> text=Chat")
    page.wait_for_selector("#composer-hint:has-text('waiting for a complete chain')")
    right = page.evaluate(
        """() => Math.max(...[...document.querySelectorAll("#chat, #chat button, #composer")].map(
            (e) => e.getBoundingClientRect().right))"""
    )
    assert right <= width


def test_everything_comes_from_the_gateway(four: ConsoleServer, open_page: OpenPage) -> None:
    page = open_page(four.url, expected="Executing inline script violates")
    loaded = page.evaluate("performance.getEntriesByType('resource').map(e => e.name)")
    assert loaded
    assert [url for url in loaded if not url.startswith(four.url)] == []
    page.evaluate(
        """() => {
          const script = document.createElement("script");
          script.textContent = "window.harmed = 1";
          document.body.append(script);
        }"""
    )
    assert page.evaluate("window.harmed") is None, "the policy lets no script in"


def test_the_page_is_sent_with_its_policy_and_not_twice(four: ConsoleServer) -> None:
    with urllib.request.urlopen(four.url) as answer:
        policy = answer.headers["Content-Security-Policy"]
        tag = answer.headers["ETag"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    again = urllib.request.Request(four.url, headers={"If-None-Match": tag})
    with pytest.raises(urllib.error.HTTPError, match="304"):
        urllib.request.urlopen(again)


@pytest.mark.parametrize(
    "path", ["static/../console.py", "static/%2e%2e/console.py", "static//etc/passwd", "static/"]
)
def test_only_files_of_the_page_are_served(four: ConsoleServer, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(four.url + path)


def test_every_file_of_the_page_is_small_and_has_a_type() -> None:
    found = static_files()
    assert "index.html" in found
    assert sum(len(file.data) for file in found.values()) < 400_000
    assert {file.media_type for name, file in found.items() if name.endswith(".js")} == {
        "text/javascript"
    }


def test_patches_mean_the_same_in_the_page(four: ConsoleServer, open_page: OpenPage) -> None:
    page = open_page(four.url)
    chance = random.Random(7)

    def document(depth: int = 0) -> dict[str, Any]:
        def value() -> object:
            kind = chance.randrange(4 if depth < 3 else 3)
            plain = chance.choice([1, "x", True, [1, 2], [{"a": 1}]])
            return document(depth + 1) if kind == 3 else plain

        return {chance.choice("abcdef"): value() for _ in range(chance.randrange(5))}

    pairs = [(document(), document()) for _ in range(300)]
    patched = page.evaluate(
        """async (pairs) => {
          const { merge } = await import("./static/js/feed.js");
          return pairs.map(([old, patch]) => merge(old, patch));
        }""",
        [[old, changes(old, new)] for old, new in pairs],
    )
    assert patched == [new for _, new in pairs]
    assert [merged(old, changes(old, new)) for old, new in pairs] == patched


def test_the_keyboard_reaches_everything(four: ConsoleServer, open_page: OpenPage) -> None:
    page = open_page(four.url)
    page.wait_for_selector(".card[data-state=online]")
    page.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                """() => {
                  const { id, className, tagName } = document.activeElement;
                  return id || className || tagName;
                }"""
            )
        )
    assert {"skip", "theme", "card", "prompt", "event-search", "time-session"} - reached <= {
        "time-session"  # hidden until there is a request
    }
