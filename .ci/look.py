"""Looks at every page of the built site in headless Chromium, on a desk and on a phone, in light and in dark colours.

python .ci/look.py site build/look    # fails, and says where, if something is not as a reader should see it

Chromium is playwright's (`playwright install chromium`), or the program that the variable CHROMIUM names.
"""

import os
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from playwright.sync_api import Page, sync_playwright

WIDTHS = (1280, 400)
SCHEMES = {"light": "default", "dark": "slate"}  # the palettes of mkdocs.yml
LARGEST_PICTURE = 200_000  # bytes
OPTIONS = ["--no-sandbox"]  # which a container lacks

FAULTS = """width => {
    const found = [], root = document.documentElement
    if (root.scrollWidth > width) found.push(`the page is ${root.scrollWidth} pixels wide`)
    for (const image of document.images)
        if (!image.complete || !image.naturalWidth) found.push(`no picture ${image.src}`)
        else if (image.clientWidth < 300 && image.naturalWidth > 600) found.push(`${image.src} is too small to read`)
    if (width > 1000)
        for (const table of document.querySelectorAll("article table")) {
            const room = table.closest(".md-typeset__table, .doc-contents, article").parentElement.clientWidth
            if (table.scrollWidth > room + 2) found.push(`a table of ${table.scrollWidth} pixels in ${room}: ` +
                table.querySelector("th").innerText)
        }
    for (const formula of document.querySelectorAll(".arithmatex"))
        if (!formula.querySelector("mjx-container")) found.push(`not typeset: ${formula.innerText}`)
    if (document.querySelector("[data-mml-node=merror]")) found.push("a formula with an error")
    return found
}"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def serve(folder: Path) -> str:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


def faults(page: Page, address: str, width: int, colours: str, shot: Path) -> list[str]:
    """What is wrong with the page at `address`, of which a picture goes to `shot`."""
    found: list[str] = []
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on("requestfailed", lambda request: found.append(f"not loaded: {request.url}"))
    page.on(
        "request", lambda request: found.append(f"from elsewhere: {request.url}") if is_foreign(request.url) else None
    )
    page.goto(address, wait_until="load")
    page.wait_for_selector(f"body[data-md-color-scheme={SCHEMES[colours]}]", state="attached")
    page.evaluate("() => window.MathJax?.startup?.promise")
    found += page.evaluate(FAULTS, width)
    page.screenshot(path=str(shot), full_page=False)
    return found


def is_foreign(address: str) -> bool:
    return not address.startswith(("http://127.0.0.1:", "data:", "blob:"))


def main(site: Path, shots: Path) -> None:
    shots.mkdir(parents=True, exist_ok=True)
    wrong = [
        f"{path}: {path.stat().st_size:,} bytes"
        for path in site.rglob("*")
        if path.suffix in (".svg", ".png") and path.stat().st_size > LARGEST_PICTURE
    ]
    address, looked = serve(site), 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=os.environ.get("CHROMIUM"), args=OPTIONS)
        for colours in ("light", "dark"):
            for width in WIDTHS:
                context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=colours)
                context.add_init_script("localStorage.clear()")  # a palette that an earlier view has stored
                for path in sorted(site.rglob("index.html")):
                    name = path.parent.relative_to(site).as_posix().replace("/", "-").replace(".", "home", 1)
                    page = context.new_page()
                    url = f"{address}/{path.relative_to(site)}"
                    wrong += [
                        f"{name}, {width}, {colours}: {fault}"
                        for fault in faults(page, url, width, colours, shots / f"{name}-{width}-{colours}.png")
                    ]
                    looked += 1
                    page.close()
        browser.close()
    print("\n".join([*wrong, f"{looked} views, {len(wrong)} faults, pictures in {shots}"]))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
