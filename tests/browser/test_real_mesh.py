"""A mesh of real processes, its gateway, and a person at the page: loss and return of a node."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.pages import OpenPage, wait_until
from support.processes import Mesh, Node, start_bootstrap, workspace

from shardmesh.demo_model import DEMO_MODEL

pytestmark = [pytest.mark.processes, pytest.mark.browser, pytest.mark.slow]

N_SHARDS = 4
N_LISTENERS = 5  # shard 2 has a replica
N_TOKENS = 700
WAIT_MS = 60_000


class RealMesh:
    """Listeners by number; the last one serves shard 2 as a spare."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        mesh.listeners = [self.start(number) for number in range(N_LISTENERS)]
        mesh.wait_ready()
        web = ("--port", "0", "--ws-port", "0", "--state-dir", str(mesh.space.folder / "web"))
        self.web = mesh.space.start("web", *mesh.where, *web)
        self.url = self.web.wait_line(r"HTTP on (http://[\d.:]+/)", 60)[1]

    def start(self, number: int) -> Node:
        state = str(self.mesh.space.folder / f"state-{number}")
        options = ("--ctx-size", "1024", "--parallel", "2", "--state-dir", state)
        return self.mesh.listen(2 if number == N_SHARDS else number, *options)


@pytest.fixture
def real(tmp_path: Path, browser: object) -> Iterator[RealMesh]:
    if not DEMO_MODEL.exists():
        pytest.skip("the demo model is not in this checkout")
    with workspace() as space:
        shards = space.folder / "shards"
        done = space.run("split", str(DEMO_MODEL), "--shards", str(N_SHARDS), "--out", str(shards))
        assert done.code == 0, done.err
        yield RealMesh(Mesh(space, "test", shards, start_bootstrap(space, "test")))


@pytest.mark.timeout(240)
def test_an_answer_outlives_a_listener(real: RealMesh, open_page: OpenPage) -> None:
    page = open_page(real.url)
    page.set_default_timeout(WAIT_MS)
    for number, listener in enumerate(real.mesh.listeners):
        card = f".card[data-peer='{listener.peer_id}'][data-state=online]"
        page.wait_for_selector(card)
        shard_id = page.evaluate(f"shardmesh.state.nodes['{listener.peer_id}'].shard_id")
        assert shard_id == (2 if number == N_SHARDS else number)

    page.click("#chat-settings-toggle")
    page.fill("text=Tokens at most >> input", str(N_TOKENS))
    page.fill("text=Repetition >> input", "1.2")
    page.fill("#prompt", "Once upon a time there was a king who")
    page.keyboard.press("Enter")
    wait_until(page, "Object.values(shardmesh.state.sessions).some((s) => s.n_tokens > 10)")
    (chain,) = page.evaluate("Object.values(shardmesh.state.sessions).map((s) => s.chain)")
    number = next(n for n, node in enumerate(real.mesh.listeners) if node.peer_id == chain[2])
    real.mesh.listeners[number].running.process.kill()

    page.wait_for_selector(f".card[data-peer='{chain[2]}'][data-state=offline]")
    page.wait_for_selector(".event[data-kind='node.lost']")
    page.wait_for_selector(".event[data-kind='session.recovered']")
    page.wait_for_selector(".message.answer:not([aria-busy]) .answer-meta b")
    assert not page.locator(".answer-note.bad").is_visible()
    assert "took over after" in page.locator(".answer-note.moved").inner_text()
    assert page.locator("#headline").get_attribute("data-tone") == "", "the spare serves its layers"

    real.mesh.listeners[number] = real.start(number)
    page.wait_for_selector(f".card[data-peer='{chain[2]}'][data-state=online]")
    page.wait_for_selector(".event[data-kind='node.returned']")
    page.reload()
    page.wait_for_selector(".event[data-kind='session.recovered']")
