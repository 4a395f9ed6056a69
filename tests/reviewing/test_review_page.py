"""The page of launch/review.py in a browser: by keys and clicks, with the list on disk compared after each change."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile
from conftest import VOICES, play, write_manifest
from test_review_server import PART, Client, served

pytestmark = pytest.mark.slow
MARKUP = '<img src=x onerror="document.title=1">&amp;</textarea><script>alert(1)</script>'
NUM_CLIPS = 60


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"audio": str(VOICES / f"anna_0{i % 8}.flac"), "text": f"Clip {i}."} for i in range(NUM_CLIPS)]
    rows[1] |= PART
    rows[2] |= {"text": MARKUP, "speaker": "<b>anna</b>"}
    rows[3]["audio"] = "missing<b>.wav"
    return write_manifest(tmp_path_factory.mktemp("reviewed") / "clips<i>.jsonl", rows)


@pytest.fixture(scope="module")
def client(clips: Path) -> Iterator[Client]:
    with served(clips) as client:
        yield client


@pytest.fixture
def review_page(browser: Any, client: Client) -> Iterator[Any]:
    """The page, which must not log or raise anything, or request anything from elsewhere."""
    page = browser.new_page(viewport={"width": 1240, "height": 900})
    page.set_default_timeout(5000)
    messages, requested = [], []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requested.append(request.url))
    page.expected = []
    page.goto(client.server.url)
    page.wait_for_selector("#rows tr")
    yield page
    assert [text for text in messages if not any(words in text for words in page.expected)] == []
    assert all(url.startswith((client.server.url, "data:")) for url in requested)
    page.close()


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def wait_for(page: Any, is_true: Callable[[], bool]) -> None:
    for _ in range(250):
        if is_true():
            return
        page.wait_for_timeout(20)
    raise AssertionError(page.locator("#message").inner_text() or "nothing happened within 5 s")


def test_edit_drop_and_keep(review_page: Any, clips: Path) -> None:
    page, before = review_page, clips.read_bytes()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.keyboard.press("Control+a")
    page.keyboard.type('Clip "eins", d n p / \u00fc.')
    page.keyboard.press("Enter")
    wait_for(page, lambda: lines_of(clips)[1]["text"] == 'Clip "eins", d n p / \u00fc.')
    page.keyboard.press("j")
    page.keyboard.press("d")
    wait_for(page, lambda: len(lines_of(clips)) == NUM_CLIPS - 1)
    assert MARKUP not in clips.read_text()
    page.wait_for_selector("tr.dropped.current")
    assert page.locator("tr.dropped textarea").get_attribute("readonly") is not None
    assert "60 shown of 60 clips, 1 dropped" in page.locator("#counts").inner_text()
    # A new visit begins where the last one ended.
    page.reload()
    page.wait_for_selector("tr.dropped.current")
    page.locator("tr.dropped button").click()
    wait_for(page, lambda: len(lines_of(clips)) == NUM_CLIPS)
    page.keyboard.press("k")
    page.keyboard.press("e")
    page.keyboard.press("Control+a")
    page.keyboard.type("Not this.")
    page.keyboard.press("Escape")
    page.keyboard.press("e")
    page.keyboard.press("Control+a")
    page.keyboard.type("Clip 1.")
    page.locator("h1").click()
    wait_for(page, lambda: clips.read_bytes() == before)


def test_texts_are_texts(review_page: Any) -> None:
    """Markup in a text, a speaker, the name of a file and that of the list is shown, and not interpreted."""
    page = review_page
    row = page.locator("#rows tr").nth(2)
    assert row.locator("textarea").input_value() == MARKUP
    assert "<b>anna</b>" in row.inner_text()
    assert page.locator("#rows tr").nth(3).locator(".fault").inner_text() == "audio: no such file"
    assert page.locator("h1").inner_text().endswith("clips<i>.jsonl")
    assert page.locator("img, #rows b, h1 i, #rows script").count() == 0
    assert page.title().startswith("Review: ")


def test_clips_play(review_page: Any) -> None:
    """A whole file, where one can go to any place in it, and a part of one; Space plays and pauses."""
    page = review_page
    players = page.locator("audio")
    duration = soundfile.info(VOICES / "anna_00.flac").duration
    assert play(players.nth(0))[1] == pytest.approx(duration, abs=0.02)
    players.nth(0).evaluate("player => { player.currentTime = 0.5; }")
    wait_for(page, lambda: players.nth(0).evaluate("player => !player.seeking && player.currentTime >= 0.5"))
    assert play(players.nth(1))[1] == pytest.approx(PART["duration"], abs=0.02)
    assert players.nth(0).evaluate("player => player.paused")  # only one plays at a time
    page.locator("#rows tr").nth(5).locator("td").first.click()
    players.nth(5).evaluate("player => { player.muted = true; }")
    for is_playing in (True, False):
        page.keyboard.press(" ")
        wait_for(page, lambda is_playing=is_playing: players.nth(5).evaluate("p => p.paused") != is_playing)


def test_pages_and_search(review_page: Any) -> None:
    page = review_page
    assert page.locator("#rows tr").count() == 50
    page.keyboard.press("n")
    wait_for(page, lambda: page.locator("#rows tr").count() == 10)
    assert "page 2 of 2" in page.locator("#place").inner_text()
    page.keyboard.press("ArrowUp")
    wait_for(page, lambda: page.locator("#rows tr").count() == 50)
    assert page.locator("tr.current td").first.inner_text() == "50"
    page.keyboard.press("/")
    page.keyboard.type("clip 5")
    page.keyboard.press("Enter")
    wait_for(page, lambda: page.locator("#rows tr").count() == 11)
    assert page.locator("#rows td:first-child").all_inner_texts() == ["6", *map(str, range(51, 61))]
    page.select_option("#shown", "dropped")
    wait_for(page, lambda: page.locator("#rows tr").count() == 0)


def test_what_cannot_be_saved_is_said(review_page: Any, clips: Path) -> None:
    """A text that the reader would refuse, and a list that has another line meanwhile: nothing typed is lost."""
    page, before = review_page, clips.read_text()
    page.expected = ["status of 422", "status of 409"]
    box = page.locator("textarea").nth(4)
    box.fill("a <|eot_id|>")
    box.press("Enter")
    wait_for(page, lambda: "contains <|eot_id|>" in page.locator("#message").inner_text())
    assert box.input_value() == "a <|eot_id|>"
    assert clips.read_text() == before
    theirs = f'{{"audio": "new.wav", "text": "Theirs."}}\n{before}'
    clips.write_text(theirs)
    box.fill("Mine.")
    box.press("Enter")
    wait_for(page, lambda: "Your text was: Mine." in page.locator("#message").inner_text())
    wait_for(page, lambda: page.locator("textarea").first.input_value() == "Theirs.")
    assert clips.read_text() == theirs
    page.locator("textarea").nth(5).fill("Mine.")
    page.locator("h1").click()
    wait_for(page, lambda: lines_of(clips)[5]["text"] == "Mine.")
