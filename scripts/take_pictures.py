"""Takes the pictures of the console in docs/images, of a mesh that exists only in this process.

    PYTHONPATH=tests:. .venv/bin/python scripts/take_pictures.py

Needs Chromium; pngquant, where it is installed, makes the files small.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright
from support.console_server import ConsoleServer, SyntheticMesh, console_server, large_mesh

from shardmesh.web.roster import Download
from shardmesh.wire.node_identity import NodeIdentity

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "images"
DESK, PHONE = (1440, 900), (390, 844)
NAMES = ("attic", "kitchen", "studio", "laptop-ana", "cellar", "workshop", "bench", "tower")
PROMPT = "Tell me of the king and his daughters."
ANSWER = (
    "The king had **three daughters**, and each of them a room in the tower.\n\n"
    "1. The eldest kept *birds*.\n2. The second kept the keys.\n3. The youngest kept `silence`.\n\n"
    "One evening a stranger came to the gate and asked for bread. The cook gave him the crust, the "
    "steward gave him the door, and only the youngest came down the stairs with a lamp in her hand."
    "\n\n“Who sent you?” she asked, and the stranger laughed and said that nobody ever had.\n"
)
DOWNLOAD = Download(
    name="shard-3.gguf",
    n_bytes=3_200_000_000,
    n_bytes_done=1_210_000_000,
    bytes_per_s=81e6,
    n_sources=3,
    remaining_s=25.0,
)


def join(mesh: SyntheticMesh, *numbers: int, n_sessions: int = 0, loaded: bool = True) -> None:
    """Nodes with names and plausible reports."""
    for number in numbers:
        identity = NodeIdentity(uuid="", name=NAMES[number])
        mesh.add(number, identity=identity, model_name="Fairy tales", loaded=loaded)
        tell(mesh, number, n_sessions=n_sessions)


def tell(mesh: SyntheticMesh, number: int, n_sessions: int) -> None:
    mesh.report(
        number,
        round_trip_ms=0.4 + 0.6 * number,
        memory_bytes=(200 + 40 * number) << 20,
        tokens_per_s=38.0 + number / 5 if n_sessions else 0.0,
        n_sessions=n_sessions,
        n_kv_tokens=79 if n_sessions else 0,
    )


def open_page(browser: Browser, url: str, size: tuple[int, int], scheme: str) -> Page:
    width, height = size
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.goto(url)
    page.wait_for_selector("#live[data-state=live]")
    return page


def save(page: Page, name: str) -> None:
    path = FOLDER / name
    page.screenshot(path=path)
    if shutil.which("pngquant"):
        command = ["pngquant", "--force", "--skip-if-larger", "--output", str(path), str(path)]
        subprocess.run(command, check=False)


def at_work(browser: Browser, server: ConsoleServer) -> None:
    def work(mesh: SyntheticMesh) -> None:
        mesh.answer, mesh.tokens_per_s = ANSWER, 33.0
        join(mesh, 0, 1, 2, 3, n_sessions=1)

    server.call(work)
    for scheme, name in (("light", "console.png"), ("dark", "console-dark.png")):
        page = open_page(browser, server.url, DESK, scheme)
        page.fill("#prompt", PROMPT)
        page.keyboard.press("Enter")
        page.wait_for_selector("text=Who sent you")
        save(page, name)
        page.close()


def after_a_loss(browser: Browser, server: ConsoleServer) -> None:
    server.call(lambda mesh: join(mesh, 0, 1, 2, 3, 4, 5))
    page = open_page(browser, server.url, DESK, "light")
    page.wait_for_selector("text=workshop")

    def trouble(mesh: SyntheticMesh) -> None:
        mesh.lose(2)
        words = "llama.cpp could not load the shard: not enough memory (wanted 9.1 GiB)"
        mesh.report(5, shard_state="failed", error=words)
        join(mesh, 7, loaded=False)
        mesh.report(7, shard_state="absent", downloads=(DOWNLOAD,))

    server.call(trouble)
    page.wait_for_selector(".card[data-state=downloading]")
    page.wait_for_selector("#headline[data-tone=bad]")
    save(page, "console-failure.png")


def on_a_phone(browser: Browser, server: ConsoleServer) -> None:
    server.call(lambda mesh: join(mesh, 0, 1, 2, 3))
    page = open_page(browser, server.url, PHONE, "light")
    page.wait_for_selector("text=laptop-ana")
    save(page, "console-phone.png")


def with_many_nodes(browser: Browser, server: ConsoleServer) -> None:
    server.call(lambda mesh: mesh.place(large_mesh(20, 10)))
    server.call(lambda mesh: mesh.keep_busy(8))
    page = open_page(browser, server.url, DESK, "light")
    page.wait_for_timeout(2500)  # the speed is that of the last second
    save(page, "console-200-nodes.png")


def main() -> None:
    scenes: tuple[Callable[[Browser, ConsoleServer], None], ...]
    scenes = (at_work, after_a_loss, on_a_phone, with_many_nodes)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        for scene in scenes:
            with console_server() as server:
                scene(browser, server)
        browser.close()


if __name__ == "__main__":
    main()
