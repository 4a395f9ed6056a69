"""Preference pairs on the page of launch/review.py: both clips play, and are swapped or dropped in the list itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import VOICES, play, speech_sample, write_manifest
from test_review_page import lines_of, review_page, wait_for  # noqa: F401 - a fixture
from test_review_server import Client, served

from higgs_ds.common.errors import InputError
from higgs_ds.reviewing.forms import file_of, form_of
from higgs_ds.reviewing.pair_list import PairLines
from higgs_ds.reviewing.review_list import ReviewList, StaleError

CHOSEN, REJECTED = "anna_00.flac", "ben_00.flac"


def pair(text: str, chosen: str = CHOSEN, rejected: str = REJECTED) -> dict[str, Any]:
    def spoken(clip: str) -> list[dict[str, Any]]:
        return [{"role": "assistant", "content": {"type": "audio", "audio_url": str(VOICES / clip)}}]

    return {
        "prompt": [{"role": "system", "content": "Speak."}, {"role": "user", "content": text}],
        "chosen": spoken(chosen), "rejected": spoken(rejected), "speaker": "anna",
        "scores": {"chosen": {"score": 0.9, "stopped": True}, "rejected": {"score": 0.25, "stopped": False}},
        "margin": 0.65, "source": "texts.jsonl:1",
    }  # fmt: skip


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_manifest(tmp_path / "pairs.jsonl", [pair("Eins \u00fc."), pair("Two."), pair("Three.", "none.flac")])


@pytest.fixture
def client(pairs: Path) -> Iterator[Client]:
    with served(pairs) as client:
        yield client


def test_swapped_and_swapped_back(pairs: Path) -> None:
    pairs.write_text("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines_of(pairs)))
    before, expected = pairs.read_bytes(), lines_of(pairs)
    review = ReviewList(pairs)
    first = review.pair(0)
    assert first
    review.swap(0, first.chosen)
    swapped = lines_of(pairs)
    assert swapped[1:] == expected[1:]
    assert (swapped[0]["chosen"], swapped[0]["rejected"]) == (expected[0]["rejected"], expected[0]["chosen"])
    assert swapped[0]["scores"] == {
        "chosen": {"score": 0.25, "stopped": False},
        "rejected": {"score": 0.9, "stopped": True},
    }
    assert swapped[0]["margin"] == -0.65
    assert swapped[0]["prompt"] == expected[0]["prompt"]
    assert (pairs.parent / "pairs.jsonl.orig").read_bytes() == before
    with pytest.raises(StaleError, match="swapped in another window"):
        review.swap(0, first.chosen)
    again = ReviewList(pairs).pair(0)
    assert again
    review.swap(0, again.chosen)
    assert pairs.read_bytes() == before


def test_dropped_and_kept_again(pairs: Path) -> None:
    before = pairs.read_bytes()
    review = ReviewList(pairs)
    review.drop(1, True)
    assert [line["prompt"][1]["content"] for line in lines_of(pairs)] == ["Eins \u00fc.", "Three."]
    second = review.pair(1)
    assert second
    with pytest.raises(InputError, match="dropped; keep it first"):
        review.swap(1, second.chosen)
    ReviewList(pairs).drop(1, False)
    assert pairs.read_bytes() == before


def test_what_is_shown(client: Client) -> None:
    page = client.rows()
    assert page["noun"] == "pairs"
    first = page["rows"][0]
    assert (first["text"], first["speaker"], first["faults"]) == ("Eins \u00fc.", "anna", [])
    assert first["pair"]["scores"] == "margin 0.65, score 0.9 / 0.25, stopped True / False"
    assert page["rows"][2]["faults"] == ["audio: no such file"]
    for which, clip in (("chosen", CHOSEN), ("rejected", REJECTED)):
        status, _, content = client.request("GET", f"audio/0?generation=0&which={which}&of=x")
        assert (status, content) == (200, (VOICES / clip).read_bytes())
    assert client.request("GET", "audio/0?generation=0&which=../x")[0] == 400


def test_changes(client: Client, pairs: Path) -> None:
    chosen = client.rows()["rows"][0]["pair"]["chosen"]
    status, answer = client.change("swap", row=0, before=chosen)
    assert (status, answer["row"]["pair"]["scores"]) == (200, "margin -0.65, score 0.25 / 0.9, stopped False / True")
    assert client.change("swap", row=0, before=chosen)[0] == 409
    status, answer = client.change("edit", row=1, text="Three.", before="Two.")
    assert (status, answer["error"]) == (422, "the text of a pair is what was spoken; it cannot be changed")
    assert lines_of(pairs)[1] == pair("Two.")


def test_recognized_by_its_content(pairs: Path, tmp_path: Path) -> None:
    assert file_of(tmp_path) == pairs
    assert form_of(pairs) == form_of(pairs, "pairs") == PairLines()
    clips = write_manifest(tmp_path / "clips.jsonl", [{"audio": "a.wav", "text": "One."}])
    assert form_of(clips) != PairLines()
    with served(clips) as client:
        assert client.change("swap", row=0, before="")[1]["error"].startswith("only the clips of a preference pair")
    with pytest.raises(InputError, match="chatml is not a list of clips"):
        form_of(write_manifest(tmp_path / "chat.jsonl", [speech_sample("One.", "anna_00.flac")]))


def test_a_line_that_is_no_pair(pairs: Path) -> None:
    """It is shown with its fault, and can be dropped."""
    pairs.write_text(pairs.read_text() + '{"prompt": [], "chosen": 3}\nno JSON\n')
    with served(pairs) as client:
        rows = client.rows()["rows"]
        assert [row["faults"] for row in rows[3:]] == [["not a JSON object with prompt, chosen, rejected"]] * 2
        assert client.change("drop", row=4, dropped=True)[0] == 200
        assert client.change("swap", row=3, before="")[0] == 422
    assert pairs.read_text().endswith('"chosen": 3}\n')


@pytest.mark.slow
def test_page(review_page: Any, pairs: Path) -> None:  # noqa: F811
    """Both clips play, one at a time; a swap and a drop by keys and by click."""
    page, before = review_page, lines_of(pairs)
    chosen, rejected = (page.locator("#rows tr").nth(0).locator("audio").nth(i) for i in (0, 1))
    lengths = [play(player)[1] for player in (chosen, rejected)]
    assert lengths[0] != lengths[1]
    assert chosen.evaluate("player => player.paused")
    assert page.locator(".scores").nth(0).inner_text().startswith("margin 0.65, score 0.9 / 0.25")
    assert page.locator("textarea").nth(0).get_attribute("readonly") is not None
    page.keyboard.press("s")
    wait_for(page, lambda: lines_of(pairs)[0]["chosen"] == before[0]["rejected"])
    wait_for(page, lambda: page.locator(".scores").nth(0).inner_text().startswith("margin -0.65"))
    assert [play(player)[1] for player in (chosen, rejected)] == lengths[::-1]
    page.locator("#rows tr").nth(0).get_by_text("swap").click()
    wait_for(page, lambda: lines_of(pairs)[0] == before[0])
    page.keyboard.press("j")
    page.keyboard.press("d")
    wait_for(page, lambda: len(lines_of(pairs)) == 2)
    page.wait_for_selector("tr.dropped")
    assert "3 shown of 3 pairs, 1 dropped" in page.locator("#counts").inner_text()
