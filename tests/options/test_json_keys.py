"""Lines of keys in a JSON text."""

from __future__ import annotations

from higgs_ds.options.json_keys import keys_of

TEXT = r"""{"a": "b", "b": {
  "c": ["a", {"x": 1}, {"x": ":", "y": [{"x": {}}]}],
  "quote \" and { \\": {"a":
    {"\u0061": null}},

  "c": "c"
}, "z"
  : 1}"""


def test_every_key_has_its_sections_and_its_line() -> None:
    quote = 'quote " and { \\'
    found = [(keys, line) for keys, line in keys_of(TEXT) if not any(key.startswith("[") for key in keys)]
    assert found == [
        (("a",), 1),
        (("b",), 1),
        (("b", "c"), 2),
        (("b", quote), 3),
        (("b", quote, "a"), 3),
        (("b", quote, "a", "a"), 4),
        (("b", "c"), 6),
        (("z",), 7),
    ]


def test_objects_in_a_list_may_have_the_same_keys() -> None:
    in_lists = [keys for keys, _ in keys_of(TEXT) if any(key.startswith("[") for key in keys)]
    assert [keys[-1] for keys in in_lists] == ["x", "x", "y", "x"]
    assert len(set(in_lists)) == 4


def test_texts_without_keys() -> None:
    for text in ("{}", "[]", "1", '"a: {"', '[":", {}]'):
        assert list(keys_of(text)) == []
