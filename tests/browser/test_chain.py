"""The chain as a person sees it: who is there, who is gone, what is being fetched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from support.console_server import ConsoleServer, SyntheticMesh, large_mesh
from support.pages import OpenPage, wait_until
from support.roster import LAYERS, peer_id_of_number

from shardmesh.web.roster import Download

if TYPE_CHECKING:
    pass

pytestmark = [pytest.mark.processes, pytest.mark.browser]


def card(number: int, state: str = "") -> str:
    wanted = f"[data-state={state}]" if state else ""
    return f".card[data-peer='{peer_id_of_number(number)}']{wanted}"


def event(kind: str) -> str:
    return f".event[data-kind='{kind}']"


def test_four_nodes_online_with_the_right_shards(four: ConsoleServer, open_page: OpenPage) -> None:
    page = open_page(four.url)
    page.wait_for_selector(card(3, "online"))
    stages = page.locator(".stage:not(.gateway-port)")
    assert stages.count() == 4
    for number, (start, end) in enumerate(LAYERS):
        stage = stages.nth(number)
        assert stage.locator("header .mono").inner_text() == f"[{start}, {end})"
        assert stage.locator(card(number)).count() == 1
    assert page.locator("#headline").inner_text() == "fairy tales is ready."
    assert page.locator("#ruler button").count() == 4
    assert page.locator("#model-list tbody tr").count() == 4
    assert page.locator("#model-list tbody tr").nth(2).inner_text().split()[:3] == [
        "2",
        "[4,",
        "7)",
    ]


def test_a_lost_node_is_shown_offline_and_comes_back(
    four: ConsoleServer, open_page: OpenPage
) -> None:
    page = open_page(four.url)
    page.wait_for_selector(card(2, "online"))
    four.call(lambda mesh: mesh.lose(2))
    page.wait_for_selector(card(2, "offline"))
    page.wait_for_selector(event("node.lost"))
    page.wait_for_selector("#headline[data-tone=bad]")
    assert "[4, 7)" in page.locator("#headline-more").inner_text()
    assert "--shard-id 2" in page.locator("#join-body code").first.inner_text()

    page.reload()
    page.wait_for_selector(card(2, "offline"))
    page.wait_for_selector(event("node.lost"))
    four.call(lambda mesh: mesh.add(2))
    page.wait_for_selector(card(2, "online"))
    page.wait_for_selector(event("node.returned"))
    assert page.locator("#headline").inner_text() == "fairy tales is ready."
    assert page.locator(".card[data-peer]").count() == 4, "nobody is counted twice"


def test_the_line_to_join_has_the_link_of_a_published_model(
    four: ConsoleServer, open_page: OpenPage
) -> None:
    page = open_page(four.url)
    line = page.locator("#join-body code").first
    page.wait_for_selector(card(3, "online"))
    assert "--bootstrap" in line.inner_text()
    assert "--model" not in line.inner_text()

    def publish(mesh: SyntheticMesh) -> None:
        mesh.links["ab" * 32] = "shardmesh:fairy%20tales?m=abab&k=cdcd&b=/ip4/10.0.0.1/tcp/51820"
        mesh.lose(2)

    four.call(publish)
    page.wait_for_selector("#join-body code:has-text('--shard-id 2')")
    assert line.inner_text() == (
        "shardmesh listen --cluster demo --shard-id 2 --model "
        "'shardmesh:fairy%20tales?m=abab&k=cdcd&b=/ip4/10.0.0.1/tcp/51820'"
    )


def test_a_goodbye_is_no_failure(four: ConsoleServer, open_page: OpenPage) -> None:
    page = open_page(four.url)
    page.wait_for_selector(card(3, "online"))
    four.call(lambda mesh: mesh.lose(3, goodbye=True))
    page.wait_for_selector(event("node.left"))
    assert page.locator(card(3)).count() == 0
    page.wait_for_selector(".gap")


def test_a_download_is_seen_to_its_end(four: ConsoleServer, open_page: OpenPage) -> None:
    page = open_page(four.url)

    def fetched(n_bytes: int, state: str = "downloading") -> None:
        download = Download(
            name="shard-1.gguf",
            n_bytes=1 << 30,
            n_bytes_done=n_bytes,
            bytes_per_s=64 << 20,
            n_sources=2,
            remaining_s=12.0,
            state=state,
        )
        four.call(lambda mesh: mesh.report(5, shard_state="absent", downloads=(download,)))

    four.call(lambda mesh: mesh.add(5, loaded=False))
    fetched(256 << 20)
    bar = page.locator(".download [role=progressbar][aria-valuenow='25']")
    bar.wait_for()
    facts = page.locator(".download .facts").inner_text()
    assert facts == "256 MiB of 1.0 GiB · 64.0 MiB/s · 12 s left · from 2 sources"
    assert "fetching 25 %" in page.locator(card(5, "downloading")).inner_text()
    fetched(512 << 20)
    page.wait_for_selector(".download [role=progressbar][aria-valuenow='50']")
    fetched(1 << 30, "done")
    page.wait_for_selector(event("download.finished"))
    page.wait_for_selector(".download", state="detached")
    four.call(lambda mesh: mesh.add(5))
    page.wait_for_selector(card(5, "online"))


def test_a_failure_says_why(four: ConsoleServer, open_page: OpenPage) -> None:
    page = open_page(four.url)
    page.wait_for_selector(card(1, "online"))
    four.call(lambda mesh: mesh.report(1, shard_state="failed", error="there is no memory left"))
    page.wait_for_selector(card(1, "failed"))
    assert "there is no memory left" in page.locator(card(1)).inner_text()
    page.wait_for_selector(event("shard.failed"))
    assert "there is no memory left" in page.locator(event("shard.failed")).inner_text()


def test_events_are_filtered_by_kind_and_words(four: ConsoleServer, open_page: OpenPage) -> None:
    page = open_page(four.url)
    page.wait_for_selector(event("gateway.started"))
    four.call(lambda mesh: mesh.add(6))
    four.call(lambda mesh: mesh.lose(3))
    page.wait_for_selector(event("node.lost"))
    page.click("text=Joins and leaves")
    page.wait_for_selector(f"#event-list:not(:has({event('node.lost')}))")
    assert page.locator(event("node.joined")).count() >= 1
    assert page.locator(event("gateway.started")).count() == 0
    page.click("#event-kinds >> text=Failures")
    page.wait_for_selector(event("node.lost"))
    page.fill("#event-search", "no such words")
    page.wait_for_selector("#event-list .quiet")


def test_details_of_a_node(four: ConsoleServer, open_page: OpenPage) -> None:
    page = open_page(four.url)
    page.focus(card(1))
    page.keyboard.press("Enter")
    dialog = page.locator("#node-dialog")
    dialog.wait_for()
    assert peer_id_of_number(1) in dialog.inner_text()
    assert "1, layers [1, 4)" in dialog.inner_text()
    asked: list[tuple[str, str, Any]] = []
    page.route(
        "**/v1/nodes/**",
        lambda route: (
            asked.append((route.request.method, route.request.url, route.request.post_data_json))
            or route.fulfill(json={})
        ),
    )
    dialog.locator("select").select_option("2")
    dialog.get_by_role("button", name="Load", exact=True).click()
    page.wait_for_selector(".toast")
    dialog.get_by_role("button", name="Unload its shard").click()
    assert len(asked) == 1, "a person is asked twice before sessions end"
    dialog.get_by_role("button", name="Unload?").click()
    page.wait_for_selector("text=unloads its shard")
    own = f"v1/nodes/{peer_id_of_number(1)}/shard"
    assert [(method, body) for method, url, body in asked if own in url] == [
        ("POST", {"shard_id": 2}),
        ("DELETE", None),
    ]
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert page.evaluate("document.activeElement.dataset.peer") == peer_id_of_number(1)


def test_an_empty_mesh_says_how_to_begin(server: ConsoleServer, open_page: OpenPage) -> None:
    page = open_page(server.url)
    page.wait_for_selector("text=No listener yet")
    assert page.locator(".empty code").inner_text().startswith("shardmesh listen --cluster demo")
    server.call(lambda mesh: mesh.add(0))
    page.wait_for_selector(card(0, "online"))
    assert not page.locator(".empty").is_visible()


def test_a_broken_connection_comes_back(four: ConsoleServer, open_page: OpenPage) -> None:
    page = open_page(four.url)
    page.evaluate("shardmesh.feed.socket.close()")
    page.wait_for_selector("#live[data-state=lost], #live[data-state=live]")
    four.call(lambda mesh: mesh.add(7))
    page.wait_for_selector(card(7, "online"))
    page.wait_for_selector("#live[data-state=live]")


def test_micro_batches_move_and_time_is_shown(four: ConsoleServer, open_page: OpenPage) -> None:
    page = open_page(four.url)
    four.call(lambda mesh: mesh.keep_busy(2))
    page.wait_for_selector(card(0, "busy"))
    page.wait_for_selector(".waterfall tbody tr:nth-child(5)")
    assert page.locator(".waterfall tbody th").nth(2).inner_text().startswith("Stage 2")
    picture = "document.getElementById('motion').toDataURL()"
    first = page.evaluate(picture)
    wait_until(page, f"{picture} !== {first!r}")
    page.emulate_media(reduced_motion="reduce")
    wait_until(
        page,
        f"""new Promise((done) => {{
          const before = {picture};
          setTimeout(() => done({picture} === before), 200);
        }})""",
    )


def test_below_the_waterfall_a_phone_shows_nothing(
    four: ConsoleServer, open_page: OpenPage
) -> None:
    page = open_page(four.url, width=390, height=500)
    four.call(lambda mesh: mesh.keep_busy(2))
    page.wait_for_selector(".waterfall tbody tr:nth-child(5)")
    assert page.evaluate("document.documentElement.scrollHeight") == 500


def test_two_hundred_nodes(server: ConsoleServer, open_page: OpenPage) -> None:
    server.call(lambda mesh: mesh.place(large_mesh(20, 10)))
    page = open_page(server.url)
    wait_until(page, "document.querySelectorAll('.card[data-peer]').length === 200")
    # One report changes what belongs to that node, nothing else.
    page.evaluate(
        """() => {
          window.touched = new Set();
          const all = { subtree: true, childList: true, characterData: true, attributes: true };
          new MutationObserver((changes) => changes.forEach(({ target }) => {
            const element = target.nodeType === Node.TEXT_NODE ? target.parentElement : target;
            const card = element?.closest("[data-peer]");
            if (card) touched.add(card.dataset.peer);
          })).observe(document.getElementById("chain-body"), all);
        }"""
    )
    server.call(lambda mesh: mesh.report(123, shard_state="failed", error="gone wrong"))
    page.wait_for_selector(card(123, "failed"))
    assert page.evaluate("[...touched]") == [peer_id_of_number(123)]
