"""The file of the review page, whose texts stay data, and the decisions that it saves."""
import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
from review_pages import HOSTILE, demo_page, line_of, make_page, make_pair, write_lines

from data import DataError
from labels import review
from labels.review import page_html, read_decisions, write_page

# --------------------------------------------------------------------------------------------------
# The file


class Elements(HTMLParser):
    """The elements of a page, and the text of its scripts by type"""

    def __init__(self, html):
        super().__init__()
        self.tags = []
        self.scripts = {}
        self.script = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, attributes))
        self.script = dict(attributes).get("type", "code") if tag == "script" else None

    def handle_endtag(self, tag):
        self.script = None

    def handle_data(self, text):
        if self.script:
            self.scripts[self.script] = self.scripts.get(self.script, "") + text


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_texts_of_the_data_stay_data(text):
    page = make_page([make_pair(0, prompt=text, chosen=text, rejected=text)], title=text)
    html = page_html(page)
    found = Elements(html)
    assert json.loads(found.scripts["application/json"]) == page
    assert found.tags == Elements(page_html(make_page([]))).tags
    assert html.encode()  # no half of a surrogate pair is left
    assert text not in html and "\u2028" not in html


def test_the_file_is_written_as_a_whole(tmp_path):
    path = tmp_path / "new folder" / "report.html"
    write_page(path, demo_page())
    assert path.read_text() == page_html(demo_page())
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(OSError, match=f"{tmp_path}: cannot be written"):
        write_page(tmp_path, make_page([]))


def test_numbers_that_json_lacks_are_empty():
    page = make_page([make_pair(0, mean=float("nan"), std=float("inf"))])
    pair = json.loads(Elements(page_html(page)).scripts["application/json"])["pairs"][0]
    assert pair["mean"] is None and pair["std"] is None


def test_the_page_refers_to_nothing_outside():
    template = review.TEMPLATE.read_text()
    for tag, attributes in Elements(template).tags:
        assert tag not in ("link", "img", "iframe", "base", "object", "embed")
        assert not {"src", "href", "style", "action"} & {name for name, _ in attributes}
        assert not [name for name, _ in attributes if name.startswith("on")]
    assert re.findall(r"https?://[^\"\s]+", template) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"url\(|@import|innerHTML|outerHTML|insertAdjacentHTML|eval\(", template)


def test_the_policy_admits_the_templates_own_code_alone():
    html = page_html(make_page([]))
    policy = re.search('Content-Security-Policy" content="(.*?)"', html)[1]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        content = re.search(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)[1]
        sha256 = hashlib.sha256(content.encode()).digest()
        assert f"{tag}-src 'sha256-{base64.b64encode(sha256).decode()}';" in policy


# --------------------------------------------------------------------------------------------------
# decisions.jsonl


def test_decisions_are_read_in_order(tmp_path):
    path = write_lines(
        tmp_path / "decisions.jsonl",
        line_of("a.jsonl:9", decision="unsure"), "", line_of(decision="right"),
        line_of(key="another", note="more keys are allowed"), line_of(decision="right"),
    )
    assert list(read_decisions(path).items()) == [
        (("a.jsonl:9", "k"), "unsure"), (("a.jsonl:1", "k"), "right"),
        (("a.jsonl:1", "another"), "wrong"),
    ]


@pytest.mark.parametrize("content", [b"", b"\n \r\n"])
def test_no_decisions_are_no_error(tmp_path, content):
    path = tmp_path / "decisions.jsonl"
    path.write_bytes(content)
    assert read_decisions(path) == {}


def test_a_byte_order_mark_and_windows_lines_are_understood(tmp_path):
    path = tmp_path / "decisions.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(line_of()).encode() + b"\r\n")
    assert read_decisions(path) == {("a.jsonl:1", "k"): "wrong"}


@pytest.mark.parametrize("line, reason", [
    ("{", "broken JSON"),
    ("[1]", "must be an object with source and key and decision, not a list"),
    ({"source": "a", "decision": "wrong"}, "key 'key' is missing; save the decisions again"),
    (line_of(key=3), "'key' must be a string, not a number"),
    (line_of(source=None), "'source' must be a string, not null"),
    (line_of(decision=True), "'decision' must be a string, not a boolean"),
    (line_of(decision="Wrong"), "'decision' is 'Wrong'; give one of wrong, right, unsure"),
    (line_of(decision="x\ny" * 99), "give one of wrong, right, unsure"),
    (line_of(source="\ud800"), "half of a surrogate pair"),
    ('{"key": "a", "key": "b"}', "key 'key' is given twice"),
])
def test_a_wrong_line_is_named_in_one_line(tmp_path, line, reason):
    path = write_lines(tmp_path / "decisions.jsonl", line_of(), "", line)
    with pytest.raises(DataError) as raised:
        read_decisions(path)
    message = str(raised.value)
    assert message.startswith(f"{path}:3: ") and reason in message
    assert "\n" not in message and len(message) < 300


def test_two_decisions_of_one_pair_are_an_error_that_names_both_lines(tmp_path):
    path = write_lines(tmp_path / "decisions.jsonl", line_of(), line_of("b"),
                       line_of(decision="right"))
    with pytest.raises(DataError, match=r":3: 'a.jsonl:1' is right here and wrong in line 1; remo"):
        read_decisions(path)


def test_a_path_that_is_no_file_is_named(tmp_path):
    with pytest.raises(DataError, match="no such file; name the decisions.jsonl"):
        read_decisions(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        read_decisions(tmp_path)
    path = tmp_path / "decisions.jsonl"
    path.write_bytes(b'{"source": "\xff"}\n')
    with pytest.raises(DataError, match="decisions.jsonl:1: not UTF-8"):
        read_decisions(path)
