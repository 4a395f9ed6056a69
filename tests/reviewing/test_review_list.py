"""A reviewed list, read by the trainer's reader: edited texts are in it, dropped clips not, all else is unchanged."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from higgs_ds.common import files
from higgs_ds.common.errors import InputError, SaveError
from higgs_ds.data.formats.reader import read_entries
from higgs_ds.model.sample import Entry, Sample
from higgs_ds.options.train import DataOptions
from higgs_ds.reviewing import review_list
from higgs_ds.reviewing.review_list import DROPPED, KEPT, ReviewList, StaleError, opened_list

# Lists as people have them: unknown keys, own spacing, blank lines, quotes, no line end at the end.
LISTS = {
    "lines": (
        '{"audio_filepath": "a.wav", "text": "One.", "duration": 2.10, "speaker": 3}\n'
        ' {"text":"Zwei: \u00fcber \u4e8c\\t.","note": {"text": "x"}, "audio": {"path":"b.wav"}, "id":1e3}\r\n'
        "\n"
        '{"audio_filepath": "c.wav", "offset": 1.5, "duration": 2, "Text" : "Dr\\u0065i \\"3\\"", "lang": "de"}\n'
        '{"audio": "d.wav", "text": "Four.", "ref_audio": "r.wav", "ref_text": "Said before."}'
    ),
    "array": (
        '[\n  {"file_name": "a.wav",\n   "text": "One."},\n\n  {"text": "Two, [2].", "file_name": "b.wav"} ,\n'
        '  {"file_name": "c.wav", "text": "Three.", "keys": [1, {"text": 2}]}\n]\n'
    ),
    "array on a line": '[{"audio": "a.wav", "text": "One."}, {"audio": "b.wav", "text": "Two."}]',
    "marked": '\ufeff{"audio": "a.wav", "text": "One."}\n{"audio": "b.wav", "text": "Two."}\n',
    "commas": (
        'file_name,transcription,speaker,note\r\na.wav,"One, and ""two""\nof them.",anna,"x"\r\n\r\n'
        'b.wav,Two.,ben,\r\n"c.wav",Th"ree,,"a,b"\r\n'
    ),
    "semicolons": "\n\nid;wav;text\n1;a.wav;One.\n2;b.wav;Two.",
    "tabs": 'path\tsentence\tlocale\na.mp3\t"One" two\ten\nb.mp3\tTwo.\tde\n',
    "bars with a header": "audio|text|speaker\na.wav|One.|anna\nb.wav|Two.|ben\n",
    "LJSpeech": (
        "LJ1|There are 2 of them.| There are two of them. \n\nLJ2|Dr. Brown has left us.|Doctor Brown has left us.\n"
        "LJ3|We met on May 5.|We met on May fifth.\nLJ4|It is said.|It is said.\n"
    ),
    "VITS": "a.wav|3|One of them.\nb.wav|4|Two of them.\nc.wav|4|Three of them.",
}
NEW = "Neu \u00fc, etwas."


def written(folder: Path, text: str) -> Path:
    path = folder / "list"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    return path


def entries(path: Path) -> list[Entry]:
    return list(read_entries(path, DataOptions()))


def samples(path: Path) -> list[Sample]:
    """Return the samples without their lines, which change where a clip is dropped."""
    found = entries(path)
    assert not [entry.faults for entry in found if entry.faults]
    return [replace(entry.sample, source="") for entry in found if entry.sample is not None]


def spoken(sample: Sample, text: str) -> Sample:
    """Return a sample whose words are others: those of the last turn but one."""
    *before, user, clip = sample.messages
    return replace(sample, messages=(*before, replace(user, parts=(text,)), clip))


def num_same(first: bytes, second: bytes) -> int:
    """Return how many bytes are the same at the beginning of both."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


@pytest.mark.parametrize("name", LISTS)
def test_edited(tmp_path: Path, name: str) -> None:
    """Each row in turn: the reader gets the new text, and only that part of the file differs."""
    path = written(tmp_path, LISTS[name])
    before, expected = path.read_bytes(), samples(path)
    for number, sample in enumerate(expected):
        review = ReviewList(written(tmp_path, LISTS[name]))
        old = review.rows[number].text
        assert old is not None
        assert spoken(sample, old.strip()) == sample
        review.edit(number, f" {NEW} ", old)
        assert samples(path) == [*expected[:number], spoken(sample, NEW), *expected[number + 1 :]]
        after = path.read_bytes()
        same = num_same(before, after)
        rest = num_same(before[same:][::-1], after[same:][::-1])
        replaced = before[same : len(before) - rest].decode("utf-8", "ignore")
        assert len(replaced) <= 2 * len(old) + 2  # with quotes and escapes
        assert (tmp_path / "list.orig").read_bytes() == before
        assert ReviewList(path).rows[number].text == NEW


@pytest.mark.parametrize("name", LISTS)
def test_dropped_and_kept_again(tmp_path: Path, name: str) -> None:
    """Each row in turn, and all but one: the reader does not see them; taken back, the file is what it was."""
    path = written(tmp_path, LISTS[name])
    before, expected = path.read_bytes(), samples(path)
    for number in range(len(expected)):
        ReviewList(path).drop(number, True)
        assert samples(path) == expected[:number] + expected[number + 1 :]
        review = ReviewList(path)
        assert (review.find(shown=DROPPED), len(review.find(shown=KEPT))) == ([number], len(expected) - 1)
        if name.startswith("array") and number == len(expected) - 1:
            # The comma before it was not in the file any more, and comes back with the usual blank after it.
            review.drop(number, False)
            assert json.loads(path.read_text()) == json.loads(before)
            path.write_bytes(before)
            continue
        review.drop(number, False)
        assert path.read_bytes() == before
        assert not (tmp_path / "list.dropped").exists()
    review = ReviewList(path)
    for number in range(1, len(expected)):
        review.drop(number, True)
    assert samples(path) == expected[:1]
    with pytest.raises(InputError, match="the last clip cannot be dropped"):
        review.drop(0, True)
    for number in random.Random(0).sample(range(1, len(expected)), len(expected) - 1):
        review.drop(number, False)
    assert path.read_bytes() == before


def test_bytes_that_are_written(tmp_path: Path) -> None:
    path = written(tmp_path, LISTS["lines"])
    review = ReviewList(path)
    review.edit(0, 'Say "1".', "One.")
    review.edit(2, "\u00dcber", 'Drei "3"')
    review.drop(1, True)
    assert path.read_bytes().decode() == (
        '{"audio_filepath": "a.wav", "text": "Say \\"1\\".", "duration": 2.10, "speaker": 3}\n'
        '{"audio_filepath": "c.wav", "offset": 1.5, "duration": 2, "Text" : "\\u00dcber", "lang": "de"}\n'
        '{"audio": "d.wav", "text": "Four.", "ref_audio": "r.wav", "ref_text": "Said before."}'
    )
    path = written(tmp_path, LISTS["commas"])
    (tmp_path / "list.dropped").unlink()
    review = ReviewList(path)
    review.edit(1, 'Two, "2"', "Two.")
    review.edit(2, "Three", 'Th"ree')
    review.drop(0, True)
    assert path.read_bytes().decode() == (
        'file_name,transcription,speaker,note\r\nb.wav,"Two, ""2""",ben,\r\n"c.wav",Three,,"a,b"\r\n'
    )


def test_mode_and_links_stay(tmp_path: Path) -> None:
    path = written(tmp_path, LISTS["lines"])
    path.chmod(0o640)
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "metadata.jsonl"
    link.symlink_to(path)
    ReviewList(link).edit(0, NEW, "One.")
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert NEW in path.read_text()


def test_folders(tmp_path: Path) -> None:
    for name, text in (("metadata.jsonl", LISTS["lines"]), ("metadata.csv", LISTS["LJSpeech"])):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text(text)
        with opened_list(folder) as review:
            review.drop(0, True)
        # What lies beside the list does not make the folder one of another form.
        assert len(samples(folder)) == len(review.rows) - 1


REFUSED = {
    "metadata": '{"samples": [{"audio_file": "a.wav", "text": "One."}]}',
    "chatml": '{"messages": [{"role": "user", "content": "One."}]}',
}


@pytest.mark.parametrize("name", REFUSED)
def test_lists_that_cannot_be_written_back(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, REFUSED[name])
    with pytest.raises(InputError, match=rf"list: format: {name} is not a list.*write a metadata\.jsonl"):
        ReviewList(path)
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "a.wav").touch()
    with pytest.raises(InputError, match=r"format: paired: the folder has no list.*write a metadata\.jsonl"):
        opened_list(tmp_path / "pairs").__enter__()
    with pytest.raises(InputError, match="not a complete JSON array"):
        ReviewList(written(tmp_path, '[{"audio": "a.wav", "text": "One."}, {'))
    assert sorted(os.listdir(tmp_path)) == ["list", "pairs"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("lines", " ", "text: is empty or blank"),
        ("lines", "a <|eot_id|>", "contains <|eot_id|>"),
        ("lines", "\ud800", "half of a surrogate pair"),
        ("tabs", "a\tb", "must not contain '\\\\t'"),
        ("VITS", "a|b", "must not contain '|'"),
        ("VITS", "a\nb", "a line break"),
    ],
)
def test_texts_that_are_refused(tmp_path: Path, name: str, text: str, words: str) -> None:
    path = written(tmp_path, LISTS[name])
    review = ReviewList(path)
    with pytest.raises(InputError, match=words.replace("|", r"\|")):
        review.edit(0, text, review.rows[0].text or "")
    assert path.read_bytes() == LISTS[name].encode()
    assert os.listdir(tmp_path) == ["list"]


def test_a_change_that_would_change_the_form_of_the_list(tmp_path: Path) -> None:
    """Without the first row, both other fields are single words, and could be speakers."""
    path = written(tmp_path, "a.wav|anna|One of them.\nb.wav|anna|Two\nc.wav|ben|Three\n")
    review = ReviewList(path)
    with pytest.raises(InputError, match=r"of another form|cannot detect"):
        review.drop(0, True)
    assert path.read_text() == "a.wav|anna|One of them.\nb.wav|anna|Two\nc.wav|ben|Three\n"
    assert len(review.find(shown=KEPT)) == 3


def test_faults_can_be_corrected(tmp_path: Path) -> None:
    """A clip without words is found all the same, so that it can be heard."""
    path = written(tmp_path, '{"audio": "a.wav", "text": ""}\n{"audio": "b.wav", "text": "Two."}\n{"audio": "c.wav"}\n')
    review = ReviewList(path)
    assert "is empty or blank" in review.entry(0).faults[0]
    assert [clip and clip.path for clip in map(review.clip, range(3))] == [tmp_path / "a.wav", tmp_path / "b.wav", None]
    review.edit(0, "One.", "")
    review.drop(2, True)
    assert [sample.messages[-2].parts for sample in samples(path)] == [("One.",), ("Two.",)]


def test_find(tmp_path: Path) -> None:
    review = ReviewList(written(tmp_path, LISTS["lines"]))
    assert review.find("zwei: \u00dcBER") == [1]
    review.drop(1, True)
    assert (review.find("e", KEPT), review.find("e", DROPPED), review.find("e")) == ([0, 2], [1], [0, 1, 2])


def test_position_is_remembered(tmp_path: Path) -> None:
    path = written(tmp_path, LISTS["lines"])
    ReviewList(path).move_to(2)
    assert ReviewList(path).position == 2
    for damaged in ("99", '"x"', "{"):
        (tmp_path / ".list.position").write_text(damaged)
        assert ReviewList(path).position == 0


def test_changed_by_another_program(tmp_path: Path) -> None:
    """Nothing is written over it; the list is read again, with the dropped clips in their places."""
    path = written(tmp_path, LISTS["lines"])
    review = ReviewList(path)
    review.drop(1, True)
    theirs = path.read_text() + '\n{"audio": "e.wav", "text": "Five."}\n'
    path.write_text(theirs)
    with pytest.raises(StaleError, match="changed by another program"):
        review.edit(0, NEW, "One.")
    assert path.read_text() == theirs
    assert (review.generation, review.find("five"), review.find(shown=DROPPED)) == (1, [4], [1])
    with pytest.raises(StaleError):
        review.check(0)
    review.edit(0, NEW, "One.")
    assert samples(path)[0] == spoken(samples(path)[0], NEW)
    with pytest.raises(StaleError, match="in another window"):
        review.edit(0, "Else.", "One.")
    path.write_text("{}")
    with pytest.raises(InputError, match="format: cannot be detected"):
        review.refresh()


def test_changed_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, LISTS["lines"])
    review, theirs = ReviewList(path), LISTS["lines"].replace("One.", "Theirs.")
    read_form = review_list.form_of

    def form_of(temporary: Path, name: str) -> object:
        if temporary != path:
            path.write_bytes(theirs.encode())
        return read_form(temporary, name)

    monkeypatch.setattr(review_list, "form_of", form_of)
    with pytest.raises(StaleError):
        review.drop(1, True)
    assert path.read_bytes() == theirs.encode()
    assert len(ReviewList(path).find(shown=KEPT)) == 4


def test_made_again_after_clips_were_dropped(tmp_path: Path) -> None:
    """What is in the list is trained, so it is shown as kept."""
    path = written(tmp_path, LISTS["lines"])
    ReviewList(path).drop(1, True)
    written(tmp_path, LISTS["lines"])
    review = ReviewList(path)
    assert (len(review.rows), review.num_dropped()) == (4, 0)


def in_a_fork(action: Callable[[], None]) -> int:
    """Run an action in a fork of this process; return its exit code, or the negative signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("act", ["edit", "drop", "keep"])
@pytest.mark.parametrize("name", ["lines", "array", "commas"])
def test_killed_while_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str, name: str) -> None:
    """Killed before or after each step on disk: the list is the old or the new one, and no clip is lost or doubled."""
    path = tmp_path / "list"
    number = 2 if act == "edit" else 1

    def change() -> None:
        review = ReviewList(path)
        if act == "edit":
            review.edit(number, NEW, review.rows[number].text or "")
        else:
            review.drop(number, act == "drop")

    def start() -> None:
        for file in tmp_path.glob("*"):
            file.unlink()
        written(tmp_path, LISTS[name])
        if act != "drop":
            ReviewList(path).drop(1, True)

    start()
    old, original = path.read_bytes(), [row.text for row in ReviewList(path).rows]
    change()
    new = path.read_bytes()
    assert old != new
    killed = 0
    for step in range(100):
        start()
        calls = 0

        def counted(original: Callable[..., None], step: int = step) -> Callable[..., None]:
            def call(*values: object) -> None:
                nonlocal calls
                for when in (2 * calls, 2 * calls + 1):
                    if when == step:
                        os.kill(os.getpid(), signal.SIGKILL)
                    if when % 2 == 0:
                        original(*values)
                calls += 1

            return call

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "replace", counted(os.replace))
            patch.setattr(files.os, "fsync", counted(os.fsync))
            ended = in_a_fork(change)
        assert path.read_bytes() in (old, new)
        review = ReviewList(path)
        texts = [row.text for row in review.rows]
        assert texts == original or texts == [*original[:number], NEW, *original[number + 1 :]]
        assert len(samples(path)) == len(review.find(shown=KEPT))
        if ended == 0:
            assert path.read_bytes() == new
            break
        review.edit(0, "Again.", texts[0] or "")
        assert ReviewList(path).rows == review.rows
        assert ended == -signal.SIGKILL
        killed += 1
    assert killed >= 6


def test_of_two_reviews_one_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, LISTS["lines"])
    reader, writer = os.pipe()

    def second() -> None:
        try:
            with opened_list(path):
                os.write(writer, b"opened")
        except InputError as error:
            os.write(writer, str(error).encode())

    with opened_list(path) as review:
        in_a_fork(second)
        assert f"process {os.getpid()} on ".encode() in os.read(reader, 1000)
        (tmp_path / ".list.lock").unlink()
        with pytest.raises(SaveError, match="the lock of this run was removed"):
            review.drop(0, True)
    assert path.read_bytes() == LISTS["lines"].encode()
    assert in_a_fork(second) == 0
    assert os.read(reader, 1000) == b"opened"


@pytest.mark.parametrize("name", LISTS)
def test_mutations(tmp_path: Path, name: str) -> None:
    """Of damaged lists, each row means to the review what it means to the reader, and the file is what it was."""
    draw, num_opened = random.Random(name), 0
    for _ in range(30):
        damaged = bytearray(LISTS[name].encode())
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(damaged))
            damaged[at : at + draw.randint(0, 3)] = draw.randbytes(draw.randint(0, 3))
        path = tmp_path / "list"
        path.write_bytes(damaged)
        try:
            review = ReviewList(path)
        except InputError:
            continue
        num_opened += 1
        expected = entries(path)
        shown = [review.entry(number) for number in range(len(review.rows))]
        assert [entry.sample and replace(entry.sample, source="") for entry in shown] == [
            entry.sample and replace(entry.sample, source="") for entry in expected
        ]
        number = draw.randrange(len(shown))
        text = review.rows[number].text
        if shown[number].sample is not None and text is not None:
            with contextlib.suppress(InputError):  # it changes the form of the list, or would be read differently
                review.edit(number, "Other.", text)
                review.edit(number, text, "Other.")
            assert entries(path) == expected or review.rows[number].text == "Other."
    assert num_opened >= 2  # an array is seldom one after that
