"""The review page: one HTML file on which a person decides which suspect labels are wrong.

`page` of write_page is a dictionary; labels/review.html shows it:

    title       heading of the page
    run         id of the data and the run: the browser keeps decisions under it
    summary     [{"title", "text"}], blocks of preformatted text, such as the audit
    histogram   {"edges", "kept", "suspect", "label"}; B counts each, B + 1 edges
    groups      [{"column", "value", "pairs", "doubted", "low", "high", "stands_out"}]; doubted is a
                share of the pairs, low and high are its interval
    columns     names of the columns of few values, to filter by
    pairs       [{"source", "key", "prompt", "chosen", "rejected", "score", "mean", "std",
                "suggestion", "length_says", "columns"}], most suspect first; source: FILE:LINE;
                key: hash of the texts; score: 0 to 1, low is suspect; suggestion: keep, drop or
                exchange; length_says: text or number; columns: {name: value}

Decisions are JSON lines {"source", "key", "decision"}; decision: one of DECISIONS.
"""
import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from data import DataError
from formats.records import read_lines
from formats.values import check_strings
from runtime import files
from runtime.inputs import NO_FILE, why_no_file, why_unusable

DECISIONS = ("wrong", "right", "unsure")  # what the reviewer says of the label
KEYS = ("source", "key", "decision")
TEMPLATE = Path(__file__).with_name("review.html")
POLICY_MARK = "{{policy}}"
PAGE_MARK = "{{page}}"


# --------------------------------------------------------------------------------------------------
# Writing the page


def write_page(path: files.PathLike, page: Mapping):
    """Write the review page, one file that needs no server.  Raises OSError like files.save"""
    files.save_text(path, page_html(page))


def page_html(page):
    """The template with its policy and the data; the data come last, so no mark in them counts"""
    template = TEMPLATE.read_text(encoding="utf-8")
    html = template.replace(POLICY_MARK, security_policy(template))
    return html.replace(PAGE_MARK, embedded_json(page))


def embedded_json(page):
    """JSON in ASCII without <, > and &, so that no text in it can end the script element"""
    text = json.dumps(files.finite(page))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def security_policy(template):
    """Content-Security-Policy: nothing is loaded; only the template's own style and script apply"""
    return (
        f"default-src 'none'; style-src {content_hash('style', template)}; "
        f"script-src {content_hash('script', template)}; base-uri 'none'; form-action 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


def content_hash(tag, template):
    """Hash, as a policy writes it, of what stands in the element <tag> without attributes"""
    _, _, rest = template.partition(f"<{tag}>")
    content, _, _ = rest.partition(f"</{tag}>")
    sha256 = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(sha256).decode()}'"


# --------------------------------------------------------------------------------------------------
# Reading the decisions


def read_decisions(path: files.PathLike) -> dict[tuple[str, str], str]:
    """The decisions.jsonl of a review page -> {(source, key): decision}, in the file's order.

    The file may be empty.  A pair may be decided twice, but not in two ways.
    Raises DataError, one line that names file, line and remedy.
    """
    check_path(path)
    decisions = {}
    line_of = {}
    for number, record in read_records(path):
        where = f"{path}:{number}"
        check_decision(record, where)
        pair = record["source"], record["key"]
        decision = record["decision"]
        if decisions.setdefault(pair, decision) != decision:
            raise DataError(
                f"{where}: {ascii(pair[0])[:80]} is {decision} here and {decisions[pair]} in line "
                f"{line_of[pair]}; remove one of the two lines"
            )
        line_of.setdefault(pair, number)
    return decisions


def check_path(path):
    reason = why_unusable(str(path)) or why_no_file(path)
    if reason == NO_FILE:
        reason = "no such file; name the decisions.jsonl that the review page has saved"
    if reason:
        raise DataError(f"{path}: {reason}")


def read_records(path):
    """Yields (line number, JSON value) of every line that is not blank.  Raises DataError."""
    try:
        with open(path, "rb") as file:
            yield from read_lines(file, path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); check its permissions"
        ) from None


def check_decision(record, where):
    """Raise DataError unless a JSON value is one decision."""
    remedy = "; save the decisions again from the review page"
    check_strings(record, where, KEYS, remedy)
    if record["decision"] not in DECISIONS:
        decision = ascii(record["decision"])[:40]
        known = ", ".join(DECISIONS)
        raise DataError(f"{where}: 'decision' is {decision}; give one of {known}")
