"""Draw assets/explorer.png anew: the explorer's page on the bundled teacher and student, in headless Chromium.

python assets/figures/explorer.py [FILE]
"""

import shutil
import sys
import threading
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from workbench.explorer.api import session_of
from workbench.explorer.server import ExplorerServer

FILE = Path(__file__).parents[1] / "explorer.png"


def main(file: Path) -> None:
    """Two heads in the circuit, one of them in view."""
    session = session_of("teacher", "student", task="entity_tracking")
    for head in ("L0H5", "L4H2"):
        session.do("toggle", side="teacher", head=head)
    session.do("select", side="teacher", head="L4H2")
    server = ExplorerServer(session)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="dark")
        page.goto(server.url)
        page.wait_for_selector('[data-ready="true"]', timeout=300_000)
        page.screenshot(path=file, full_page=True)
        browser.close()
    server.shutdown()
    session.close()
    Image.open(file).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FILE)
