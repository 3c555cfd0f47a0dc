"""Makes the pictures of the README from a run of the embedded sample: its report, and a search with its model.

python scripts/readme_pictures.py outputs/sample

It needs Chromium, and playwright and clipmini[serve], which come with clipmini[dev]. What is shown of the report ends
before its config and its environment, so that nothing of the machine is in it.
"""

import argparse
import contextlib
import io
import shutil
import socket
import tempfile
import threading
import time
import urllib.parse
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from clipmini.config import PACKAGE
from clipmini.report.command import write_report
from clipmini.search import embed, server

WIDTH = 1200  # pixels; GitHub shows some 900
SHARPNESS = 1.5  # pixels of the picture for each of them
REPORT_HEIGHT, SEARCH_HEIGHT = 580, 812
QUALITY = 80  # of WebP


def photograph(page: Page, address: str, height: int, output: Path) -> None:
    """Write the top of a page as WebP."""
    page.set_viewport_size({"width": WIDTH, "height": height})
    page.goto(address, wait_until="networkidle")
    with Image.open(io.BytesIO(page.screenshot())) as picture:
        picture.convert("RGB").save(output, "WEBP", quality=QUALITY, method=6)
    print(f"{output}  {output.stat().st_size:,} bytes")


def find_port() -> int:
    """Return a port that nobody listens at."""
    with socket.create_server((server.HOST, 0)) as free:
        return int(free.getsockname()[1])


def serve(run: Path, scratch: Path) -> str:
    """Embed the pictures that a run was judged by, serve them until this process ends, and return the address."""
    index, port = scratch / "index", find_port()
    embed.run([f"model={run}", f"input={PACKAGE / 'sample/wds_twemoji'}", f"output={index}", "num_workers=0"])
    thread = threading.Thread(target=server.run, args=([str(index), f"port={port}"],), daemon=True)
    thread.start()
    while thread.is_alive():
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection((server.HOST, port)):
            return f"http://{server.HOST}:{port}"
        time.sleep(0.1)
    raise SystemExit(f"nothing answers at port {port}")


def main() -> None:
    """Make the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="its directory")
    parser.add_argument("--query", default="heart")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / ".github/pictures")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory, sync_playwright() as playwright:
        scratch = Path(directory)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(device_scale_factor=SHARPNESS, color_scheme="light")
        report = write_report(options.run, scratch / "report.html")
        photograph(page, report.as_uri(), REPORT_HEIGHT, options.output / "report.webp")
        address = f"{serve(options.run, scratch)}/?{urllib.parse.urlencode({'query': options.query})}"
        photograph(page, address, SEARCH_HEIGHT, options.output / "search.webp")
        browser.close()


if __name__ == "__main__":
    main()
