"""Foreign text in Markdown: it is shown, and nothing comes of it. Stored tables stay as they are, to the byte."""

from __future__ import annotations

from typing import Any

import pytest
from builders import make_results
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from tokenbridge.reproduction.discrepancies import run as discrepancies
from tokenbridge.results.markdown import code, escape, markdown_table, to_markdown
from tokenbridge.results.schema import Row, Trend, read
from tokenbridge.utils.files import reference_folder

PARSER = MarkdownIt("commonmark", {"html": True}).enable("table")
ACTIVE = {"html_inline", "html_block", "link_open", "image", "heading_open", "fence", "code_block", "hr"}

NASTY = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[a](javascript:alert(1))",
    "![a](https://example.org/pixel.png)",
    "[a]: javascript:alert(1)",
    "<javascript:alert(1)>",
    "&lt;script&gt;",
    "&#60;script&#62;",
    "\\[a](javascript:alert(1))",
    "\\\\[a](javascript:alert(1))",
    "\\<b>",
    "a | b",
    "a \\| b",
    "a\n\n# heading\n\n<b>",
    "`a` <b>",
    "`a <b>",
    "``a` | <b>`",
    "\x1b[31mred\x07",
    "abc\u202egpj",
    "\u2028<b>",
]
hostile = st.one_of(
    st.sampled_from(NASTY),
    st.text(st.sampled_from("<>&|[]()`\\!#*_~:;\"' \n\tajavscript/-=1."), max_size=30),
    st.text(st.characters(exclude_categories=())),
)


def tokens_of(text: str) -> list[Any]:
    found = []
    for token in PARSER.parse(text):
        found += [token, *(token.children or ())]
    return found


@given(hostile, hostile)
def test_foreign_text_is_shown_and_nothing_comes_of_it(first: str, second: str) -> None:
    page = "\n".join([*markdown_table(["", escape(first)], [[escape(second), escape(first)], ["x", "y"]]), "", "end"])
    page += f"\n\nMeasured by {code(first)} ({escape(second)}).\n\n1. {code(second)} {escape(first)}\n"
    kinds = [token.type for token in tokens_of(page)]
    assert not ACTIVE & set(kinds)
    assert kinds.count("td_open") == 4
    assert kinds.count("th_open") == 2
    assert not any(character in page for character in "\x1b\x07\u202e\u2028")


def visible(text: str) -> str:
    return "".join(token.content for token in tokens_of(text) if token.type in ("text", "code_inline", "text_special"))


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="`*_"), min_size=1))
def test_what_is_shown_is_the_text(text: str) -> None:
    assert visible("x " + escape(text)).split() == ["x", *text.split()]


def test_a_result_file_of_hostile_texts() -> None:
    rows = [
        Row(
            id="table3/x",
            label=text,
            metrics={"FID-digits": 1.0, f"FID ({text[:20]})".replace("\n", " "): 1.0},
            not_run=text,
        )
        for text in NASTY
    ]
    trends = [Trend(id="a", claim=text, measured=1.0, bound=1.0, relation=">=") for text in NASTY]
    results = make_results(rows, trends, scale=NASTY[0], command=NASTY[2], started=NASTY[1], commit=NASTY[3])
    assert not ACTIVE - {"heading_open"} & {token.type for token in tokens_of(to_markdown(results, None))}


@pytest.mark.parametrize("folder", ["tiny", "discrepancies"])
def test_stored_tables_are_as_they_were(folder: str) -> None:
    stored = reference_folder() / folder
    results = read(stored / "results.json")
    page = to_markdown(results, results) if folder == "tiny" else discrepancies.to_markdown(results)
    assert page.rstrip("\n") == (stored / "tables.md").read_text(encoding="utf-8").rstrip("\n")
