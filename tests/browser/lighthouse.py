"""Lighthouse on three pages of the built site, as on a phone: `make lighthouse`.

    python tests/browser/lighthouse.py _build/html   # needs npm and Chromium

Accessibility and best practices must reach LEAST; performance is said, and judged by
a reader, for it also tells how busy this machine is.
"""

import functools
import gzip
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

VERSION = "13.5.0"
PAGES = ("book/intro", "book/chapters/01-svd-baseline", "book/ledger")
JUDGED = ("accessibility", "best-practices")
LEAST = 95
FLAGS = "--headless=new --no-sandbox --disable-gpu --disable-background-networking"
ZIPPED = {".html", ".css", ".js", ".json", ".svg"}


class AsOnTheWeb(http.server.SimpleHTTPRequestHandler):
    """Sends text packed, as the host of the book does."""

    def send_head(self) -> io.BytesIO | None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return None
        data, zipped = path.read_bytes(), path.suffix in ZIPPED
        if zipped:
            data = gzip.compress(data)
        self.send_response(200)
        self.send_header("Content-Type", self.guess_type(path))
        self.send_header("Content-Length", str(len(data)))
        if zipped:
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        return io.BytesIO(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def scores(address: str) -> dict[str, int]:
    """Each category's score of one page, of 100."""
    with TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [
            *("npx", "--yes", f"lighthouse@{VERSION}", address, "--quiet"),
            f"--only-categories=performance,{','.join(JUDGED)}",
            *("--output=json", f"--output-path={report}", f"--chrome-flags={FLAGS}"),
        ]
        subprocess.run(command, check=True)
        found = json.loads(report.read_text(encoding="utf-8"))["categories"]
    return {name: round(100 * kind["score"]) for name, kind in found.items()}


def main(site: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None or shutil.which("npx") is None:
        raise SystemExit("Lighthouse needs Chromium and npm on the PATH.")
    os.environ.setdefault("CHROME_PATH", chromium)
    handler = functools.partial(AsOnTheWeb, directory=str(site))
    failed = False
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for page in PAGES:
            found = scores(f"http://127.0.0.1:{server.server_port}/{page}.html")
            print(page, found, flush=True)
            failed |= any(found[kind] < LEAST for kind in JUDGED)
        server.shutdown()
    if failed:
        raise SystemExit(f"{' and '.join(JUDGED)} are to be {LEAST} or more.")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
