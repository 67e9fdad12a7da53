"""A server on this machine that answers as mirrors do on their bad days."""

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CONTENT = bytes(range(256)) * 2048


class Server(ThreadingHTTPServer):
    """`replies[path]` is a list of replies, used up one by one, the last one kept; `seen` the requests, in order.

    A reply is a dict: content; status; partial: 206 where nobody asked for a part; etag; type; cut: bytes after which
    the connection is closed; ranges: whether partial requests are understood; hold: an event to wait for before
    anything is sent; headers: others beside these, None for one that is left out.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies, self.seen = {}, []
        self.arrived = threading.Event()

    def url(self, path):
        return f"http://127.0.0.1:{self.server_port}{path}"

    def ranges(self):
        return [request["range"] for request in self.seen]

    def handle_error(self, request, client_address):
        pass  # a client that goes away is part of these tests


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        replies = self.server.replies.get(self.path, [{"status": 404}])
        reply = replies.pop(0) if len(replies) > 1 else replies[0]
        wanted, condition = self.headers.get("Range"), self.headers.get("If-Range")
        self.server.seen.append({"path": self.path, "range": wanted, "condition": condition})
        self.server.arrived.set()
        if "hold" in reply:
            assert reply["hold"].wait(30)
        if reply.get("status", 200) != 200:
            self.send_response(reply["status"])
            for name, value in {"Content-Length": "0", **reply.get("headers", {})}.items():
                self.send_header(name, value)
            self.end_headers()
            return
        content, etag = reply.get("content", CONTENT), reply.get("etag")
        first = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and reply.get("ranges", True) else 0
        if condition is not None and condition != etag:
            first = 0
        if first and first >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(reply.get("partial", 206 if first else 200))
        headers = {"Content-Length": str(len(content) - first), "ETag": etag}
        headers["Content-Type"] = reply.get("type", "application/octet-stream")
        headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}" if first else None
        for name, value in {**headers, **reply.get("headers", {})}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        end = min(len(content), reply.get("cut", len(content)))
        self.wfile.write(content[first:end])
        self.close_connection = True
