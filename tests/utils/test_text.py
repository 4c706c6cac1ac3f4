"""Foreign text holds nothing that steers a terminal, and everything that can be read."""

import unicodedata
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenbridge.utils.text import plain

TEXT = st.text(st.characters(exclude_categories=()))  # lone surrogates too


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b]0;title\x07", "�[31mred�]0;title�"),
        ("a\rb", "a�b"),
        ("\x9b31m", "�31m"),
        ("abc\u202egnp.exe\u2066", "abc�gnp.exe�"),
        ("\ud800 \ufffe", "� �"),
        ("line\n\ttab", "line\n\ttab"),
        ("Zürich, 数, 🧑‍🔬, é", "Zürich, 数, 🧑‍🔬, é"),
    ],
)
def test_what_is_replaced(text: str, shown: str) -> None:
    assert plain(text) == shown


@given(TEXT)
def test_nothing_that_steers_is_left_and_nothing_else_changes(text: str) -> None:
    safe = plain(text)
    assert len(safe) == len(text)
    for before, after in zip(text, safe, strict=True):
        steers = unicodedata.category(before) in ("Cc", "Cs", "Zl", "Zp") and before not in "\t\n"
        turns = unicodedata.bidirectional(before) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
        marks = before in "\u061c\u200e\u200f" or before in "\ufffe\uffff"
        assert after == ("�" if steers or turns or marks else before)
    assert plain(safe) == safe
    safe.encode("utf-8")


@given(TEXT)
def test_xml_holds_it(text: str) -> None:
    element = ET.Element("a", b=plain(text))
    element.text = plain(text)
    read = ET.fromstring(ET.tostring(element, encoding="unicode"))
    assert (read.text or "") == plain(text)
