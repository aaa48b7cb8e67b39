"""A server of this machine for tests of downloads; addresses of http:// are allowed meanwhile."""
import contextlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

from runtime import downloads


class Page(NamedTuple):
    """What the server answers to one path."""
    content: bytes = b""
    headers: dict = {}     # over Content-Length: the length of the content
    status: int = 200
    pause: float = 0.0     # seconds after each byte


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        page = self.server.pages.get(self.path, Page(status=404))
        self.send_response(page.status)
        headers = {"Content-Length": str(len(page.content))} | page.headers
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.send_content(page)

    def send_content(self, page):
        if not page.pause:
            self.wfile.write(page.content)
            return
        for i in range(len(page.content)):
            self.wfile.write(page.content[i:i + 1])
            time.sleep(page.pause)

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def local_server(patch, cache):
    """A running server with .url, .pages {path: Page} and .requests, a list of paths.

    patch: of pytest's monkeypatch; cache: folder for downloads
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.pages = {}
    server.requests = []
    patch.setattr(downloads, "SCHEMES", ("https", "http"))
    patch.setenv("XDG_CACHE_HOME", str(cache))
    patch.setenv("no_proxy", "127.0.0.1")
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
