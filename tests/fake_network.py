"""A stand-in for the network: requests are answered with given content."""
import io
import urllib.request

URL = "https://example.org/some/helpful/test.jsonl.gz"


class Response(io.BytesIO):
    headers = {}


def fake_network(monkeypatch, tmp_path, content, headers=None, error=None):
    """Answer every request with the content or the error -> the list of addresses requested"""
    requests = []

    def urlopen(url, timeout):
        requests.append(url)
        if error:
            raise error
        response = Response(content)
        response.headers = headers or {"Content-Length": str(len(content))}
        return response

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return requests
