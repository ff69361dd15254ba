"""The report as a person sees and uses it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import expect

from megatron_oreal.monitor.metrics import read_metrics
from megatron_oreal.monitor.report import build
from megatron_oreal.monitor.run_folder import RunFolder
from megatron_oreal.monitor.sinks import JsonlSink
from megatron_oreal.monitor.transcripts import read_lines, read_tokens
from tests import report_run
from tests.browser.conftest import Reader

Report = tuple[Path, dict[str, Any]]


def wrong(data: dict[str, Any]) -> dict[str, Any]:
    """Returns the first wrong answer that was trained on."""
    return next(item for item in data["items"] if item["trained"] and item["reward"] < 0)


def index(data: dict[str, Any]) -> int:
    return data["items"].index(wrong(data))


def test_overview_answers_in_words(report: Report, reader: Reader) -> None:
    page = reader.open(report[0])
    assert page.inner_text("#learned-0 .lead") == "Yes"
    assert "rose from 25.0 to 75.0 percent" in page.inner_text("#learned-0")
    assert page.inner_text("#time-0 .lead") == "generate, 65%"
    assert page.inner_text("#stop-0 .lead") == "2 alarms, 1 to the end"
    assert "24 of 24 transcripts (100%" in page.inner_text("#stop-0")
    blamed = page.inner_text("#blamed-0")
    assert "q falls from 0.731 to 0.315 at token 7" in blamed
    assert page.inner_text("#blamed-0 .blame:first-of-type mark") == "6"
    page.click("#blamed-0 button >> nth=0")
    page.wait_for_selector("main[data-ready=tokens]")
    assert page.inner_text("#inspect [data-name=place] b") == "7 of 9"


def test_pointing_at_a_curve_shows_what_metrics_jsonl_holds(report: Report, reader: Reader) -> None:
    page = reader.open(report[0])
    chart = page.locator("[aria-label='Policy loss and its parts']")
    chart.scroll_into_view_if_needed()
    over = chart.locator(".u-over")
    box = over.bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] - 1, box["y"] + box["height"] / 2)
    shown = chart.locator(".u-legend .u-value").all_inner_texts()
    metrics = read_metrics(report[0].parent / "metrics.jsonl")
    last = [line for line in metrics if line["kind"] == "train"][-1]
    assert shown == [str(last["iteration"]), f"{last['oreal/loss']:g}"]
    other = page.locator("[aria-label='Entropy, nats a token'] .u-legend .u-value")
    assert other.all_inner_texts() == [str(last["iteration"]), "0.5"]  # one pointer for all


def test_filters(report: Report, reader: Reader) -> None:
    page = reader.open(report[0], "#view=rollouts")
    rows = page.locator("#list .row")
    assert rows.count() == 24
    page.select_option("#f-outcome", "incorrect")
    assert rows.count() == 12
    page.select_option("#f-trained", "1")
    assert rows.count() == 4
    page.fill("#f-from", "2")
    page.press("#f-from", "Enter")
    assert rows.count() == 2
    page.fill("#f-text", "sum-3")
    assert rows.count() == 1
    page.reload()  # the filters stand in the address
    page.wait_for_selector("main[data-ready]")
    assert rows.count() == 1
    page.fill("#f-text", "no such text")
    assert page.inner_text("#group") == "No answer passes these filters."
    page.click("#f-clear")
    page.select_option("#f-rate", "1-1")
    assert rows.count() == 8


def test_a_question_shows_its_answers_side_by_side(report: Report, reader: Reader) -> None:
    item = wrong(report[1])
    page = reader.open(report[0], f"#view=rollouts&item={index(report[1])}")
    cards = page.locator(".card")
    assert cards.count() == 2
    titles = cards.locator("strong").all_inner_texts()
    assert sorted(titles) == ["answer 0 y−", "answer 1 y+"]
    first, second = (cards.nth(i).bounding_box() for i in range(2))
    assert first
    assert second
    assert first["y"] == second["y"]
    text = page.inner_text("#question")
    assert item["gold_answer"] in text
    assert "not equal" in cards.nth(1).inner_text()
    assert page.locator("#question math").count() >= 1
    assert cards.nth(0).locator("math menclose").count() == 1  # \boxed


def test_token_view_tints_by_weight_and_tells_the_stored_numbers(
    report: Report, reader: Reader
) -> None:
    stored = stored_tokens(report[0].parent, wrong(report[1]))
    page = reader.open(report[0], f"#view=tokens&item={index(report[1])}")
    spans = page.locator("#tokens .t")
    assert spans.count() == len(stored)
    assert "".join(spans.all_inner_texts()) == "\\(2+3\\)=\\boxed{6}"
    for i, weight in enumerate(stored["token_weight"].tolist()):
        tint = spans.nth(i).evaluate("node => getComputedStyle(node).backgroundColor")
        red, green, blue, *alpha = map(float, re.findall(r"[\d.]+", tint))
        assert red > green + blue / 2  # a wrong answer
        assert (alpha or [1.0])[0] == pytest.approx(0.75 * weight, abs=0.005)
    spans.nth(3).hover()
    shown = {
        cell.get_attribute("data-name"): cell.locator("b").inner_text()
        for cell in page.locator("#inspect > div").all()
    }
    # logprobs of the fourth token: rollout -1/8 x 4, policy 1/16 more, reference -1/8 x 4 - 3/16
    assert shown == {
        "token": '"3"',
        "place": "3 of 9",
        "id": "3",
        "score s": "1",
        "running mean": "1",
        "q": "0.7311",
        "weight": "0.1875",
        "log-prob. policy": "-0.4375",
        "reference": "-0.6875",
        "vLLM": "-0.5",
        "entropy": "1",
    }


def stored_tokens(root: Path, item: dict[str, Any]) -> np.ndarray:
    """Returns what the run's transcripts hold of an answer's tokens."""
    path = RunFolder(root).rollouts / f"iter_{item['iteration']:06d}.jsonl"
    key = (item["prompt_id"], item["sample"])
    lines = read_lines(path)
    line = next(each["line"] for each in lines if (each["prompt_id"], each["sample"]) == key)
    return read_tokens(path, [line])[line]


def test_jump_to_where_q_falls_the_most(report: Report, reader: Reader) -> None:
    page = reader.open(report[0], f"#view=tokens&item={index(report[1])}")
    assert page.inner_text("#fall") == 'q falls the most at token 7 "6": 0.7311 → 0.3148.'
    page.click("#jump")
    assert page.locator("#tokens .t.at").inner_text() == "6"
    assert page.locator("#tokens .t.fall.at").count() == 1
    assert "0.7311 → 0.3148" in page.inner_text("#inspect")


def test_the_keyboard_reaches_everything(report: Report, reader: Reader) -> None:
    page = reader.open(report[0])

    def press(key: str, view: str) -> None:
        page.keyboard.press(key)
        page.wait_for_selector(f"main[data-ready={view}]")
        assert page.get_attribute("#nav [aria-current=page]", "data-view") == view

    press("4", "health")
    press("2", "rollouts")
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("k")
    chosen = page.get_attribute("#list [aria-selected=true]", "data-item")
    assert chosen == "1"
    press("Enter", "tokens")
    assert f"item={chosen}" in page.url
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator("#tokens .t.at").get_attribute("data-i") == "1"
    page.keyboard.press("ArrowLeft")
    assert page.locator("#tokens .t.at").get_attribute("data-i") == "0"
    press("Escape", "rollouts")
    page.keyboard.press("/")
    page.keyboard.type("sum-2")
    assert page.locator("#list .row").count() == 2
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible()
    page.keyboard.press("Escape")
    press("1", "overview")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement !== document.body")


def test_a_narrow_window_scrolls_only_downwards(report: Report, reader: Reader) -> None:
    page = reader.open(report[0], viewport={"width": 360, "height": 700})
    for key, view in enumerate(("overview", "rollouts", "tokens", "health"), start=1):
        page.keyboard.press(str(key))
        page.wait_for_selector(f"main[data-ready={view}]")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, view


def test_dark_mode(report: Report, reader: Reader) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    page = reader.open(report[0], color_scheme="dark")
    assert page.evaluate(background) == "rgb(22, 24, 27)"
    page.click("#theme")
    assert page.evaluate(background) == "rgb(251, 251, 250)"
    page.reload()
    page.wait_for_selector("main[data-ready]")
    assert page.evaluate(background) == "rgb(251, 251, 250)"
    assert reader.open(report[0], color_scheme="light").evaluate(background) == "rgb(251, 251, 250)"


def test_text_of_a_model_is_inert(report: Report, reader: Reader) -> None:
    page = reader.open(report[0], "#view=rollouts&text=onerror")
    assert page.locator("#list .row").count() == 8
    text = page.locator(".card .answer").first.inner_text()
    assert text == report_run.HOSTILE.replace("\x1b", "\\u001b").replace("\u202e", "\\u202e")
    assert page.locator("main script, main img, main a, main mglyph").count() == 0
    assert page.locator(".card .answer .ctl").first.inner_text() == "\\u001b"
    isolated = page.locator(".card .answer").first.evaluate("n => getComputedStyle(n).unicodeBidi")
    assert isolated == "isolate"
    page.keyboard.press("4")
    page.wait_for_selector("main[data-ready=health]")
    assert "read <b>why</b>." in page.inner_text(".alarm >> nth=0")
    spans = page.locator(".alarm td button").all_inner_texts()
    assert spans == ["1 to 2", "3 to the end"]
    trace = "profile/iteration_000002/rank_0.policy.trace.json.gz"
    assert page.get_attribute(f"text={trace}", "href") == f"././{trace}"
    assert page.title() == "tiny - OREAL run report"
    # Even markup that slipped in could not run, or ask for anything.
    ran = page.evaluate(
        "() => { const s = document.createElement('script'); s.textContent = 'window.ran = 1';"
        " document.body.append(s); return window.ran }"
    )
    assert ran is None
    assert "Content Security Policy" in reader.complaints.pop()


def test_several_runs_are_drawn_together(report: Report, reader: Reader, tmp_path: Path) -> None:
    other = report_run.make_run(tmp_path / "other", iterations=2, hostile=False)
    build.write(build.Request((report[0].parent, other)), tmp_path / "both.html")
    page = reader.open(tmp_path / "both.html")
    labels = page.locator("[aria-label='Policy loss and its parts'] .u-legend .u-label")
    assert [text.split()[-1] for text in labels.all_inner_texts()] == ["iteration", "loss", "loss"]
    assert page.locator("[id^=learned-]").count() == 2
    page.keyboard.press("2")
    page.select_option("#f-run", "1")
    assert page.locator("#list .row").count() == 8


def test_a_live_page_keeps_its_view(reader: Reader, tmp_path: Path) -> None:
    root = report_run.make_run(tmp_path / "run", iterations=2, finished=False)
    request, out = build.Request((root,), refresh_s=1.0), tmp_path / "live.html"
    build.write(request, out)
    page = reader.open(out, "#view=rollouts&outcome=correct")
    # Nothing but `expect`, which asks again: the page may be loading itself at any moment.
    expect(page.locator("#run-state")).to_contain_text("still running")
    expect(page.locator("#list .row")).to_have_count(6)
    folder = RunFolder(root)
    sink = JsonlSink(folder.metrics)
    report_run.write_iteration(folder, sink, 2)
    sink.close()
    build.write(request, out)
    expect(page.locator("#list .row")).to_have_count(9)
    expect(page.locator("#f-outcome")).to_have_value("correct")
    folder.write_summary({})
    build.write(request, out)
    expect(page.locator("#run-state")).to_contain_text("finished")
    expect(page.locator("#pause")).to_be_hidden()
