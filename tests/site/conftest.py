"""The book, built once for all processes of a test run, and served."""

import functools
import http.server
import os
import threading
from pathlib import Path

import pytest
from built_site import DESKTOP, ROOT, build
from filelock import FileLock


@pytest.fixture(scope="session")
def site(tmp_path_factory, worker_id):
    """The whole book, built from nothing with warnings as errors.

    To try out a test, DRONE_SITE may name a site that is built already."""
    if os.environ.get("DRONE_SITE"):
        return Path(os.environ["DRONE_SITE"]).resolve()
    output = tmp_path_factory.getbasetemp() / "site"
    if worker_id != "master":  # the processes of a run share what lies one folder up
        output = tmp_path_factory.getbasetemp().parent / "site"
    with FileLock(f"{output}.lock"):
        built = output / "_build" / "html"
        if not output.exists():
            done = build(ROOT, output)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (built / "index.html").is_file(), "the build failed in another process"
    return built


@pytest.fixture(scope="session")
def address(site):
    """The site, served on this machine only."""
    handler = functools.partial(
        type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": _quiet}),
        directory=str(site),
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def _quiet(*_):
    """The test's report is not the place for an access log."""


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport=DESKTOP)
    yield context.new_page()
    context.close()
