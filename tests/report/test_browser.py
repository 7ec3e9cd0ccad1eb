"""The page in a real browser: it works, fast, and what a model wrote stays text."""

from __future__ import annotations

import pytest

from rllib_gtpo.record import record_files
from rllib_gtpo.report import build_report
from tests.record.samples import write_record
from tests.report.browser import CHROMIUM, Browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no browser is installed")

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    "<svg onload=document.title='owned'>{{constructor}} javascript:alert(1) <!-- ]]> \u2028\u2029"
    "\u202egnp.exe \ud800 \x00\x1b[2J <a href='http://example.com/'>x</a><base href='//e.com'>"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


def opened(browser, tmp_path, fragment="", **record):
    """A page, and the seconds that it took to open."""
    write_record(tmp_path, **record)
    build_report(str(tmp_path))
    browser.errors.clear()
    browser.requests.clear()
    return browser.open(tmp_path / "report.html", fragment)


def texts(browser, selector):
    script = f"[...document.querySelectorAll({selector!r})].map((e) => e.textContent)"
    return browser.run(script)


def test_five_hundred_trajectories_of_ten_turns_from_the_table_to_a_token(browser, tmp_path):
    seconds = opened(browser, tmp_path, iterations=8, groups=8, members=8, turns=10, tokens=40)
    assert seconds < 2.0
    assert texts(browser, "tr.row td:nth-child(2)")[0].startswith("task-")
    assert "512 trajectories in 64 groups" in texts(browser, "header")[0]

    group = browser.run("document.querySelector('tr.row').dataset.group")
    browser.click("tr.row")
    browser.until("document.querySelectorAll('.trajectory').length === 8")
    assert texts(browser, ".crumbs b") == ["iteration {}, group {}".format(*group.split("/"))]
    assert len(texts(browser, ".turn")) == 80

    browser.click(".trajectory.wrong .turn:last-of-type")
    browser.until("document.querySelector('[data-part=shaping]')")
    shown = browser.run(
        "Object.fromEntries([...document.querySelectorAll('[data-part=credit] td')]"
        ".map((e) => [e.dataset.name, Number(e.dataset.value)]))"
    )
    iteration, group_id = map(int, group.split("/"))
    file = next(f for f in record_files(tmp_path) if f.iteration == iteration)
    member = int(browser.run("document.querySelector('.trajectory.wrong').dataset.member"))
    (row,) = [
        r for r in file.read().to_pylist() if (r["group_id"], r["member"]) == (group_id, member)
    ]
    turn = row["turns"][-1]
    assert shown == {name: turn[name] for name in shown} and len(shown) == 5  # bit for bit
    siblings = [f"#{s['member']}" for s in row["similarities"]]
    assert texts(browser, "[data-part=shaping] td:first-child") == siblings
    estimators = texts(browser, ".estimate span:first-child")
    assert estimators[:3] == ["the run", "gtpo", "grpo"] and "gigpo" in estimators

    browser.click("[data-action=tokens]")
    browser.until("document.querySelectorAll('.tokens span').length === 60")
    browser.click(".tokens span:nth-child(30)")
    token = dict(
        zip(
            texts(browser, "[data-part=token] td:first-child"),
            texts(browser, "[data-part=token] td:last-child"),
            strict=True,
        )
    )
    position = len(row["token_ids"]) - 60 + 29
    assert token["id"] == str(row["token_ids"][position]) and token["trained"] == "yes"
    assert float(token["ratio"]) == pytest.approx(row["ratios"][position], rel=1e-6)
    assert token["clipped"].startswith("yes" if row["clipped"][position] else "no")

    assert browser.errors == []
    assert browser.requests == [(tmp_path / "report.html").as_uri()]


def test_sorting_and_filters(browser, tmp_path):
    opened(browser, tmp_path, iterations=2, groups=6, members=4, turns=3)
    browser.click("th:nth-child(4) button")
    browser.until("document.querySelector('th[aria-sort]').textContent.startsWith('solved')")
    solved = [int(text[:-1]) for text in texts(browser, "tr.row td:nth-child(4)")]
    assert solved == sorted(solved, reverse=True) and len(solved) == 12
    browser.click("[data-filter=invalid]")
    browser.until("document.querySelectorAll('tr.row').length < 12")
    assert all(int(text) > 0 for text in texts(browser, "tr.row td:nth-child(10)"))
    browser.click("tr.row")
    browser.until("document.querySelector('.turn')")
    invalid = browser.run("document.querySelectorAll('.turn:not(.faded)').length")
    assert 0 < invalid < 12 and browser.run("Boolean(document.querySelector('.turn.faded'))")
    assert browser.errors == []


def test_what_grpo_would_have_said(browser, tmp_path):
    opened(browser, tmp_path, groups=4, members=4, turns=3)
    browser.click("tr.row")
    browser.until("document.querySelector('.turn')")
    before = texts(browser, ".turn .a")
    browser.run(
        "(() => { const e = document.querySelector('[data-filter=estimator]');"
        "e.value = 'grpo'; e.dispatchEvent(new Event('change')); })()"
    )
    after = texts(browser, ".turn .a")
    assert after != before
    assert all(len(set(after[i : i + 3])) == 1 for i in range(0, 12, 3))  # one for a trajectory


def test_hostile_text_stays_text(browser, tmp_path):
    opened(browser, tmp_path, groups=1, members=2, text=HOSTILE, output=HOSTILE)
    page = (tmp_path / "report.html").read_bytes()
    page.decode("utf-8")
    assert b"owned" not in page and page.count(b"<script>") == 1
    browser.click("tr.row")
    browser.until("document.querySelector('.turn')")
    browser.click("[data-action=tokens]")
    shown = "".join(texts(browser, ".detail pre"))
    assert "</script><script>document.title='owned'" in shown and "\\ud800" in shown
    assert browser.run("document.title") == f"{tmp_path.name} · rllib report"
    elements = "main img, main script, main iframe, main svg, base"
    assert browser.run(f"document.querySelectorAll('{elements}').length") == 0
    assert browser.errors == [] and len(browser.requests) == 1


def test_the_policy_would_stop_a_script_that_got_in(browser, tmp_path):
    opened(browser, tmp_path, groups=1, members=2)
    browser.run(
        "(() => { const s = document.createElement('script'); s.textContent = 'window.ran = 1';"
        "document.body.append(s); const i = new Image(); i.src = 'http://127.0.0.1:9/x';"
        "document.body.append(i); })()"
    )
    browser.until("true")
    assert browser.run("window.ran === undefined")
    assert any("Content Security Policy" in str(error) for error in browser.errors)


def test_a_link_leads_to_a_turn_and_keys_move_on(browser, tmp_path):
    opened(browser, tmp_path, "#g=1/1001&t=2&k=1", groups=2, members=4, turns=3)
    browser.until("document.querySelector('.detail h2')")
    assert texts(browser, ".detail h2") == ["#2, turn 1"]
    for key in ("ArrowDown", "ArrowRight"):
        browser.call("Input.dispatchKeyEvent", type="keyDown", key=key)
    assert texts(browser, ".detail h2") == ["#3, turn 2"]
    assert browser.run("location.hash") == "#g=1/1001&t=3&k=2"


def test_a_run_without_a_record_shows_its_curves(browser, tmp_path):
    first = '{"training_iteration": 1, "accuracy": 0.5}\n'
    (tmp_path / "result.json").write_text(first + first.replace("1", "2") + '{"training_iter')
    build_report(str(tmp_path))
    browser.errors.clear()
    browser.open(tmp_path / "report.html")
    assert texts(browser, ".curve b") == ["Accuracy in training"]
    assert "no rollout record" in texts(browser, "header")[0] and browser.errors == []


def test_trajectories_without_turns_or_credit(browser, tmp_path):
    opened(browser, tmp_path, "#g=1/1000", groups=1, members=2, turns=0)
    browser.until("document.querySelectorAll('.trajectory').length === 2")
    assert browser.errors == []
