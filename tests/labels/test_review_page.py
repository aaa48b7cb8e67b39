"""The review page in a real browser: keys, filters, what it keeps, saves and loads, its looks."""
import json
import random

import pytest
from browser import CHROMIUM, Browser, wait_until
from helpers import ROOT
from review_pages import HOSTILE, line_of, make_page, make_pair, take_picture, wilson, write_lines
from scipy.stats import binomtest

from data import DataError
from labels.review import read_decisions, write_page

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def one_browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(one_browser, tmp_path):
    """The browser with a window of a laptop; it saves to tmp_path, and must report no error."""
    one_browser.events.clear()
    one_browser.resize(1280, 900)
    one_browser.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    yield one_browser
    assert errors_of(one_browser) == []


def errors_of(browser):
    """Exceptions, refused content and dialogs since the test began"""
    kinds = ("Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening")
    return [event for event in browser.events if event[0] in kinds]


def open_page(browser, folder, pairs, view="suspects", **change):
    """Write a page with a storage of its own and open it."""
    page = make_page(pairs, run=str(folder), **change)
    write_page(folder / "report.html", page)
    browser.open(folder / "report.html")
    browser.run(f"showView('{view}')")


def text_of(browser, selector):
    return browser.run(f"document.querySelector('{selector}').textContent.trim()")


def click(browser, selector):
    browser.run(f"document.querySelector('{selector}').click()")


def shown_pair(browser):
    """Number of the pair that is shown, from its source"""
    return int(text_of(browser, "#source").rpartition(":")[2]) - 1


def decisions_in(browser):
    """-> {number of the pair: decision}"""
    lines = browser.run("decisionLines()").splitlines()
    decisions = {}
    for line in map(json.loads, lines):
        decisions[int(line["key"], 16)] = line["decision"]
    return decisions


def test_keys_decide_and_go_on(browser, tmp_path):
    open_page(browser, tmp_path, [make_pair(i) for i in range(8)])
    assert shown_pair(browser) == 0
    browser.press("w", "R", "u")
    assert shown_pair(browser) == 3
    browser.press("j", "ArrowDown", "ArrowRight", "k", "ArrowUp", "ArrowLeft", "j")
    assert shown_pair(browser) == 4
    browser.press("w")
    assert decisions_in(browser) == {0: "wrong", 1: "right", 2: "unsure", 4: "wrong"}
    assert text_of(browser, "#progress") == (
        "4 of 8 suspects reviewed: 2 wrong, 1 right, 1 unsure; precision so far 0.67, "
        "95 % interval 0.21–0.94 (Wilson)"
    )
    assert browser.run("document.querySelector('#progress-bar div').style.width") == "50%"


def test_a_decision_is_cleared_and_the_last_one_found_again(browser, tmp_path):
    open_page(browser, tmp_path, [make_pair(i) for i in range(4)])
    browser.press("w", "w", "z")  # the third has none: back to the second
    assert shown_pair(browser) == 1
    assert text_of(browser, "#decided") == "✗ you decided: wrong"
    browser.press("Backspace")
    assert decisions_in(browser) == {0: "wrong"}
    assert text_of(browser, "#decided") == ""


def test_the_ends_of_the_list_hold(browser, tmp_path):
    open_page(browser, tmp_path, [make_pair(i) for i in range(2)])
    browser.press("k", "w", "j", "j", "r", "r")
    assert shown_pair(browser) == 1
    assert decisions_in(browser) == {0: "wrong", 1: "right"}


def test_keys_do_nothing_unseen(browser, tmp_path):
    open_page(browser, tmp_path, [make_pair(i) for i in range(4)], view="overview")
    browser.press("w", "j")  # no pair is in sight
    browser.press("o", "?")
    assert browser.run("byId('help').open")
    browser.press("w")
    browser.press("Escape")
    browser.wait_for("!byId('help').open")
    browser.press("/", "w", "r", "Escape", "j")  # letters of the search, which has no hit
    assert browser.run("byId('search').value") == "wr"
    assert text_of(browser, "#nothing") == "No pair passes the filters."
    browser.press("w")
    assert decisions_in(browser) == {}


def test_a_key_held_down_decides_once(browser, tmp_path):
    open_page(browser, tmp_path, [make_pair(i) for i in range(9)])
    event = {"type": "keyDown", "key": "w", "text": "w"}
    for is_repeated in (False, True, True):
        browser.send("Input.dispatchKeyEvent", **event, autoRepeat=is_repeated)
    assert decisions_in(browser) == {0: "wrong"}


def test_progress_survives_a_reload(browser, tmp_path):
    pairs = [make_pair(i) for i in range(5)]
    open_page(browser, tmp_path, pairs)
    browser.press("w", "r", "u")
    browser.open(tmp_path / "report.html")
    assert decisions_in(browser) == {0: "wrong", 1: "right", 2: "unsure"}
    assert shown_pair(browser) == 3  # the first without a decision
    assert browser.run("byId('overview').hidden")
    open_page(browser, tmp_path, pairs)
    browser.run("localStorage.removeItem(storageKey)")
    browser.open(tmp_path / "report.html")
    assert decisions_in(browser) == {}


def test_a_page_opens_where_the_review_stopped(browser, tmp_path):
    open_page(browser, tmp_path, [make_pair(i) for i in range(200)])
    browser.run("for (let i = 0; i < 100; i += 1) { decide('right'); }")
    browser.open(tmp_path / "report.html")
    assert shown_pair(browser) == 100
    row = browser.run("byId('row-100').getBoundingClientRect().toJSON()")
    area = browser.run("byId('list').getBoundingClientRect().toJSON()")
    assert area["top"] <= row["top"] and row["bottom"] <= area["bottom"]


def test_another_run_has_other_decisions(browser, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        open_page(browser, tmp_path / name, [make_pair(i) for i in range(3)])
        assert decisions_in(browser) == {}
        browser.press("w")


def test_decisions_of_another_tab_arrive(browser, tmp_path):
    open_page(browser, tmp_path, [make_pair(i) for i in range(3)])
    text = json.dumps(line_of("my_pairs.jsonl:3", f"{2:016x}", "right")) + "\n"
    browser.run(f"localStorage.setItem(storageKey, {json.dumps(text)})")
    browser.run("window.dispatchEvent(new StorageEvent('storage', { key: storageKey }))")
    assert decisions_in(browser) == {2: "right"}


def test_a_browser_without_storage_says_so_once(browser, tmp_path):
    refusal = "Object.defineProperty(window, 'localStorage', { get() { throw Error('denied'); } });"
    script = browser.send("Page.addScriptToEvaluateOnNewDocument", source=refusal)
    open_page(browser, tmp_path, [make_pair(i) for i in range(3)])
    browser.send("Page.removeScriptToEvaluateOnNewDocument", **script)
    assert text_of(browser, "#message span").startswith(
        "This browser does not keep your progress (denied). Save decisions.jsonl before you close"
    )
    click(browser, "#dismiss")
    browser.press("w", "r")
    assert browser.run("byId('message').hidden")
    assert decisions_in(browser) == {0: "wrong", 1: "right"}
    assert browser.run("state.isUnsaved")  # leaving the page needs a confirmation
    click(browser, "#save")
    assert not browser.run("state.isUnsaved")


# --------------------------------------------------------------------------------------------------
# Saving and loading


def test_saved_decisions_are_those_that_python_reads(browser, tmp_path):
    source = 'odd "name"\\ </script> é 😀.jsonl:1'
    open_page(browser, tmp_path, [make_pair(i) for i in range(3)] + [make_pair(3, source=source)])
    browser.press("w", "r", "j", "u")
    click(browser, "#save")
    wait_until((tmp_path / "decisions.jsonl").exists)  # under that name once it is complete
    assert (tmp_path / "decisions.jsonl").read_text().splitlines()[0] == (
        '{"source":"my_pairs.jsonl:1","key":"0000000000000000","decision":"wrong"}'
    )
    assert read_decisions(tmp_path / "decisions.jsonl") == {
        ("my_pairs.jsonl:1", f"{0:016x}"): "wrong",
        ("my_pairs.jsonl:2", f"{1:016x}"): "right",
        (source, f"{3:016x}"): "unsure",
    }


def load(browser, path):
    """Choose a file as a reader would -> the message"""
    found = browser.send("Runtime.evaluate", expression="byId('file')")["result"]
    browser.run("byId('message').hidden = true")
    browser.send("DOM.setFileInputFiles", files=[str(path)], objectId=found["objectId"])
    browser.wait_for("!byId('message').hidden")
    return text_of(browser, "#message span")


def test_earlier_decisions_are_loaded(browser, tmp_path):
    open_page(browser, tmp_path, [make_pair(i) for i in range(4)])
    browser.press("w", "w")
    earlier = [
        line_of("my_pairs.jsonl:2", f"{1:016x}", "right"),
        line_of("my_pairs.jsonl:4", f"{3:016x}", "unsure"),
        line_of("my_pairs.jsonl:4", "of other texts", "wrong"),
    ]
    path = write_lines(tmp_path / "earlier.jsonl", *earlier)
    assert load(browser, path) == (
        "2 decisions loaded, and 1 of pairs that are not on this page."
    )
    expected = {
        ("my_pairs.jsonl:1", f"{0:016x}"): "wrong",
        ("my_pairs.jsonl:2", f"{1:016x}"): "right",
        ("my_pairs.jsonl:4", f"{3:016x}"): "unsure",
        ("my_pairs.jsonl:4", "of other texts"): "wrong",  # not on the page, and not lost
    }
    browser.open(tmp_path / "report.html")
    assert text_of(browser, "#progress").startswith("3 of 4 suspects reviewed: 1 wrong, 1 right")
    click(browser, "#save")
    wait_until((tmp_path / "decisions.jsonl").exists)
    assert list(read_decisions(tmp_path / "decisions.jsonl").items()) == list(expected.items())


def test_a_wrong_file_changes_nothing(browser, tmp_path):
    open_page(browser, tmp_path, [make_pair(i) for i in range(4)])
    browser.press("w")
    second = line_of("my_pairs.jsonl:2", f"{1:016x}", "right")
    for line, reason in (
        ("{", ":2: broken JSON"),
        ("null", ':2: no text under "source"'),
        (line_of(key=3), ':2: no text under "key"'),
        (line_of(decision="maybe"), ':2: "decision" is none of wrong, right, unsure'),
        (second | {"decision": "wrong"}, ":2: my_pairs.jsonl:2 is wrong here and right in"),
    ):
        path = write_lines(tmp_path / "wrong.jsonl", second, line)
        assert reason in load(browser, path)
        assert decisions_in(browser) == {0: "wrong"}
        with pytest.raises(DataError):
            read_decisions(path)


# --------------------------------------------------------------------------------------------------
# Filters


def choose(browser, selector, value):
    browser.run(f"document.querySelector('{selector}').value = '{value}'")
    browser.run(f"document.querySelector('{selector}').dispatchEvent(new Event('change'))")


def test_filters_and_search_restrict_the_list(browser, tmp_path):
    open_page(browser, tmp_path, [make_pair(i) for i in range(30)])
    browser.press("/", *"QUESTION 2", "Escape")
    assert browser.run("state.visible") == [2, *range(20, 30)]
    assert text_of(browser, "#count") == "11 of 30 pairs shown"
    assert shown_pair(browser) == 2
    choose(browser, "select[data-column=annotator]", "B")
    assert browser.run("state.visible") == [21, 23, 25, 27, 29]
    browser.run("search('')")
    choose(browser, "select[data-column=annotator]", "")
    choose(browser, "#suggestion-filter", "drop")
    assert browser.run("state.visible") == list(range(1, 30, 2))
    browser.run("search('answer is 12,')")  # of an answer alone
    assert browser.run("state.visible") == [11]


def test_undecided_pairs_leave_the_list_one_by_one(browser, tmp_path):
    open_page(browser, tmp_path, [make_pair(i) for i in range(4)])
    choose(browser, "#decision-filter", "undecided")
    browser.press("j", "w")
    assert shown_pair(browser) == 2
    browser.press("r", "u")
    assert (shown_pair(browser), browser.run("state.visible")) == (0, [0])
    browser.press("w")
    assert text_of(browser, "#nothing") == "No pair passes the filters."
    choose(browser, "#decision-filter", "wrong")
    assert browser.run("state.visible") == [0, 1]


def test_a_group_leads_to_its_suspects(browser, tmp_path):
    open_page(browser, tmp_path, [make_pair(i) for i in range(6)], view="overview")
    rows = browser.run("[...byId('groups').rows].map((row) => row.textContent)")
    assert rows == ["annotator Bstands out430.0 %", "annotator A610.0 %"]  # most doubted first
    assert browser.run("document.querySelector('.interval .range').style.left") == "40%"
    click(browser, "#groups button")
    assert browser.run("state.visible") == [1, 3, 5]
    assert not browser.run("byId('suspects').hidden")


def test_values_that_are_missing_or_empty_are_a_group_of_their_own(browser, tmp_path):
    pairs = [make_pair(i, columns=columns) for i, columns in
             enumerate(({}, {"annotator": ""}, {"annotator": None}, {"annotator": 7}))]
    groups = []
    for value in ("", "7", "nobody"):
        groups.append(make_page([])["groups"][0] | {"value": value, "doubted": 0.0})
    open_page(browser, tmp_path, pairs, view="overview", groups=groups)
    options = "[...document.querySelector('select[data-column]').options].map((o) => o.text)"
    assert browser.run(options) == ["all", "(none) (3)", "7 (1)"]
    links = "[...document.querySelectorAll('#groups button')].map((b) => b.textContent)"
    assert browser.run(links) == ["(none)", "7"]  # no pair of the page is of nobody's
    click(browser, "#groups button")
    assert browser.run("state.visible") == [0, 1, 2]


def test_precision_is_that_of_the_suspects(browser, tmp_path):
    pairs = [make_pair(i, suggestion="drop" if i < 2 else "keep") for i in range(4)]
    open_page(browser, tmp_path, pairs)
    browser.press("w", "w", "r")
    assert text_of(browser, "#progress") == (
        "2 of 2 suspects reviewed: 2 wrong, 0 right, 0 unsure; precision so far 1.00, "
        "95 % interval 0.34–1.00 (Wilson); of other pairs: 0 wrong, 1 right, 0 unsure"
    )


def test_where_no_label_is_to_be_changed_all_pairs_are_suspects(browser, tmp_path):
    pairs = [make_pair(i, suggestion="keep") for i in range(3)]
    histogram = {"edges": [0.0, 0.5, 1.0], "kept": [3, 7], "suspect": [0, 0], "label": "s"}
    open_page(browser, tmp_path, pairs, view="overview", histogram=histogram)
    assert text_of(browser, "#lead").startswith("No label is to be changed. 3 suspects, most")
    assert text_of(browser, "#begin") == "Review 3 suspects →"
    assert text_of(browser, "#legend") == "0 to be changed 10 kept"
    click(browser, "#begin")
    browser.press("w")
    assert text_of(browser, "#progress").startswith("1 of 3 suspects reviewed: 1 wrong, 0 right")
    assert "other pairs" not in text_of(browser, "#progress")


def test_the_interval_is_wilsons(browser, tmp_path):
    open_page(browser, tmp_path, [])
    for successes, trials in ((0, 1), (0, 7), (1, 1), (21, 33), (5, 200), (1000, 1000)):
        expected = binomtest(successes, trials).proportion_ci(method="wilson")
        interval = browser.run(f"wilson({successes}, {trials})")
        assert interval == pytest.approx(expected, abs=1e-4) and min(interval) >= 0
        assert wilson(successes, trials) == pytest.approx(expected, abs=1e-4)


# --------------------------------------------------------------------------------------------------
# What is shown


def test_hostile_texts_are_shown_and_not_run(browser, tmp_path):
    pairs = []
    for i, text in enumerate(HOSTILE[:5]):
        pairs.append(make_pair(i, prompt=text, chosen=text, rejected=text + " more", source=text,
                               length_says=text, suggestion=text, columns={"annotator": text}))
    block = {"title": HOSTILE[0], "text": HOSTILE[1]}
    group = make_page([])["groups"][0] | {"value": HOSTILE[1], "column": HOSTILE[0]}
    open_page(browser, tmp_path, pairs, summary=[block], groups=[group], title=HOSTILE[0])
    for text in HOSTILE[:5]:
        for selector in ("#source", "#prompt .text", "#chosen .text"):
            assert text_of(browser, selector) == text.strip()
        browser.press("j")
    browser.run("showView('overview')")
    assert text_of(browser, "h1") == HOSTILE[0] == browser.run("document.title")
    assert text_of(browser, "#summary pre") == HOSTILE[1]
    assert browser.run("typeof window.hacked") == "undefined"
    assert browser.run("document.querySelectorAll('img, body svg svg, script').length") == 2
    requested = set()
    for method, params in browser.events:
        if method == "Network.requestWillBeSent":
            requested.add(params["request"]["url"])
    assert requested == {(tmp_path / "report.html").as_uri()}


def test_the_policy_stops_injected_markup_and_code(browser, tmp_path):
    open_page(browser, tmp_path, [make_pair(0)])
    for code in (
        "document.body.innerHTML = '<b>x</b>'",
        "const s = document.createElement('script'); s.textContent = 'window.hacked = 1'; "
        "document.body.append(s); throw Error('allowed')",
    ):
        with pytest.raises(AssertionError, match="TrustedHTML|TrustedScript|assignment"):
            browser.run(code)
    image = "const i = new Image(); i.src = 'https://example.org/x.png'; document.body.append(i)"
    browser.run(f"{{ {image} }}")
    browser.wait_for("new Promise((done) => setTimeout(done, 50, true))")  # the report has come
    assert "Content Security Policy" in str(errors_of(browser))
    browser.events.clear()
    assert browser.run("typeof window.hacked") == "undefined"


def test_the_prompt_is_folded_to_its_last_human_turn(browser, tmp_path):
    prompt = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Which way?\n\nAssistant:"
    pairs = [make_pair(0, prompt=prompt), make_pair(1), make_pair(2, prompt="")]
    open_page(browser, tmp_path, pairs)
    assert text_of(browser, "#prompt") == "HumanWhich way?"
    assert text_of(browser, "#unfold") == "Show all 3 turns"
    browser.press("p")
    assert text_of(browser, "#prompt") == "HumanHiAssistantHelloHumanWhich way?"
    click(browser, "#unfold")
    assert text_of(browser, "#prompt") == "HumanWhich way?"
    browser.press("p", "w")
    assert not browser.run("state.isUnfolded")
    assert text_of(browser, "#prompt") == "Humanquestion 1?"
    assert browser.run("byId('unfold').hidden")
    browser.press("j")
    assert text_of(browser, "#prompt") == "No prompt."


def test_every_pair_is_shown_from_its_beginning(browser, tmp_path):
    open_page(browser, tmp_path, [make_pair(i, chosen="line\n" * 200) for i in range(3)])
    for key in ("w", "j"):
        browser.run("byId('pair').scrollTop = 500")
        assert browser.run("byId('pair').scrollTop") == 500
        browser.press(key)
        assert browser.run("byId('pair').scrollTop") == 0


def test_words_of_one_answer_alone_are_marked(browser, tmp_path):
    same = "We walk to the station and "
    pairs = [
        make_pair(0, chosen=" " + same + "take a train.", rejected=same + "  take the old bus."),
        make_pair(1, chosen="我们明天去学校。", rejected="我们今天去学校。"),
        make_pair(2, chosen="Two  words\n", rejected="Two words"),
        make_pair(3, chosen="Nothing at all in common", rejected="is found between these texts"),
        make_pair(4, chosen="", rejected="Only this."),
    ]
    open_page(browser, tmp_path, pairs)
    expected = [
        (["a train"], ["the old bus"]),
        (["明"], ["今"]),
        ([], []),
        ([], []),
        ([], ["Only this."]),
    ]
    notes = ["Marked:", "Marked:", "The answers differ in white space", "The answers have few",
             "Marked:"]
    for (chosen, rejected), note in zip(expected, notes):
        for side, marks in (("chosen", chosen), ("rejected", rejected)):
            found = f"[...document.querySelectorAll('#{side} mark')].map((m) => m.textContent)"
            assert browser.run(found) == marks
        assert text_of(browser, "#note").startswith(note)
        browser.press("j")


def test_what_is_not_marked_is_equal_on_both_sides(browser, tmp_path):
    open_page(browser, tmp_path, [make_pair(0)])
    rng = random.Random(0)
    texts = []
    for _ in range(60):
        words = ["alpha", "beta", "gamma,", "delta\n", "é😀", "中文"][:rng.randrange(1, 7)]
        texts.append([" ".join(rng.choices(words, k=rng.randrange(25))) for _ in "ab"])
    found = browser.run(f"""{json.dumps(texts)}.map((answers) => {{
      const [a, b] = answers.map(wordsOf);
      const {{ isCommon }} = compareWords(a, b);
      return [a, b].map((words, side) => words.map((w, i) => [w.text, w.space, isCommon[side][i]]));
    }})""")
    num_marked = 0
    for answers, sides in zip(texts, found):
        common = []
        for text, words in zip(answers, sides):
            assert "".join(word + space for word, space, _ in words) == text.lstrip()
            common.append([word for word, _, is_common in words if is_common])
            num_marked += len(words) - len(common[-1])
        few = all(is_common for words in sides for _, _, is_common in words)
        assert few or common[0] == common[1]
    assert num_marked > 100


def test_very_long_answers_are_compared_at_their_ends_alone(browser, tmp_path):
    middle = [" ".join(f"{side}{i}" for i in range(30_000)) for side in "ab"]
    pairs = [make_pair(0, chosen=f"It begins {middle[0]} and ends",
                       rejected=f"It begins {middle[1]} and ends")]
    open_page(browser, tmp_path, pairs)
    assert browser.run("document.querySelectorAll('#chosen mark').length") == 1
    assert text_of(browser, "#note").startswith("The answers are too long to compare every word")


def test_ten_thousand_pairs_are_painted_within_two_seconds(browser, tmp_path):
    rng = random.Random(0)
    words = "the a label answer question model reward of to and is not it that".split()
    pairs = []
    for i in range(10_000):
        answers = {side: " ".join(rng.choices(words, k=120)) for side in ("chosen", "rejected")}
        pairs.append(make_pair(i, **answers))
    times = []
    for _ in range(3):  # the best of three: another process may have the processor
        open_page(browser, tmp_path, pairs)
        painted = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
        ready = browser.run("performance.getEntriesByName('ready')[0].startTime")  # list and pair
        times.append(max(browser.wait_for(painted), ready))
        if times[-1] < 2000:
            break
    assert min(times) < 2000, times
    assert browser.run("document.querySelectorAll('*').length") < 1000
    browser.run("byId('list').scrollTop = 5000 * ROW_HEIGHT")
    browser.wait_for("document.querySelector('#row-5000') !== null")
    assert browser.run("document.querySelectorAll('.row').length") < 60


# --------------------------------------------------------------------------------------------------
# Looks


@pytest.mark.parametrize("width", [320, 390, 820, 1280])
def test_nothing_is_wider_than_the_window(browser, tmp_path, width):
    long_word = "x" * 300
    pairs = [make_pair(0, chosen=long_word, source=f"{long_word}.jsonl:1", prompt=long_word)]
    browser.resize(width, 800)
    summary = [{"title": "Audit", "text": long_word}]
    for view in ("overview", "suspects"):
        open_page(browser, tmp_path, pairs, view, title=long_word, summary=summary)
        assert browser.run("document.documentElement.scrollWidth") == width
        assert browser.run("document.documentElement.scrollHeight") == 800
        inside = f"byId('{'pair' if view == 'suspects' else view}')"
        assert browser.run(f"{inside}.scrollWidth <= {inside}.clientWidth")


def test_a_long_line_of_the_summary_is_wrapped(browser, tmp_path):
    summary = [{"title": "How far to trust", "text": "self-test: many words " * 30}]
    open_page(browser, tmp_path, [make_pair(0)], "overview", summary=summary)
    block = "document.querySelector('#summary pre')"
    assert browser.run(f"{block}.scrollWidth <= {block}.clientWidth")


def test_a_phone_shows_the_list_in_place_of_the_pair(browser, tmp_path):
    browser.resize(390, 800)
    open_page(browser, tmp_path, [make_pair(i) for i in range(50)])
    assert browser.run("byId('list').clientHeight") == 0
    click(browser, "#show-list")
    browser.press("w")  # no pair is in sight
    assert decisions_in(browser) == {}
    assert browser.run("byId('list').clientHeight") > 300
    assert browser.run("byId('work').clientHeight") == 0
    click(browser, "#row-3")
    assert browser.run("byId('work').clientHeight") > 300
    assert shown_pair(browser) == 3
    browser.press("/", *"question 7", "Enter", "w")
    assert decisions_in(browser) == {7: "wrong"}


def luminance(colour):
    """Relative luminance of #rrggbb, as WCAG 2 defines it"""
    linear = []
    for start in (1, 3, 5):
        c = int(colour[start:start + 2], 16) / 255
        linear.append(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("is_dark", [False, True])
def test_texts_stand_out_from_what_is_behind_them(browser, tmp_path, is_dark):
    browser.resize(1280, 900, is_dark)
    open_page(browser, tmp_path, [make_pair(0)])
    behind = {
        "text": ("ground", "surface", "sunken", "current", "chosen-mark", "rejected-mark"),
        "muted": ("ground", "surface", "sunken", "current"),
        **dict.fromkeys(("accent", "chosen", "rejected"), ("surface",)),
        **dict.fromkeys(("wrong", "right", "unsure"), ("surface", "current")),
        "on-accent": ("accent",),
    }
    for front, backs in behind.items():
        for back in backs:
            values = []
            for name in (front, back):
                style = "getComputedStyle(document.documentElement)"
                values.append(luminance(browser.run(f"{style}.getPropertyValue('--{name}')")))
            contrast = (max(values) + 0.05) / (min(values) + 0.05)
            assert contrast >= 4.5, (front, back, contrast)


def test_every_control_has_a_name(browser, tmp_path):
    open_page(browser, tmp_path, [make_pair(i) for i in range(3)])
    nodes = browser.send("Accessibility.getFullAXTree")["nodes"]
    controls = ("button", "combobox", "searchbox", "listbox", "option")
    names = {}
    for node in nodes:
        if node.get("role", {}).get("value") in controls:
            names.setdefault(node["role"]["value"], []).append(node["name"]["value"])
    assert set(names) >= {"button", "combobox", "searchbox", "listbox"}
    assert all(name for found in names.values() for name in found)
    assert names["searchbox"] == ["Search prompt and answers"]


def test_the_picture_of_the_docs(browser, tmp_path):
    picture = take_picture(browser, tmp_path)
    assert " of 160 suspects reviewed" in text_of(browser, "#progress")
    for content in (picture, (ROOT / "assets/review.png").read_bytes()):
        assert content.startswith(b"\x89PNG") and len(content) < 200_000
        assert content[16:24] == (1280).to_bytes(4) + (900).to_bytes(4)
