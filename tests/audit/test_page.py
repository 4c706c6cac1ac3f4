"""The audit's page: its structure, and in a browser where one is installed."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from conftest import ROOT
from PIL import Image

from tokenbridge.audit.figures import data_uri, pictures
from tokenbridge.audit.findings import Audit, Effect, Evidence, Finding
from tokenbridge.audit.page import (
    bar,
    claimed,
    measured,
    paper_tables,
    small_tables,
    source,
    strip,
    summary,
    write_page,
)
from tokenbridge.results import schema as results
from tokenbridge.results.ledger import Claim, Discrepancy
from tokenbridge.results.schema import Row
from tokenbridge.results.tolerances import Tolerance
from tokenbridge.results.verdicts import CLAIM_VERDICTS, Verdict

NASTY = "<script>alert('1')</script> \"quoted\" & 'single' </style> {{ braces }} — Größe 漢字 ±½"
LONG = "FrechetDistance" * 12
REFERENCE = ROOT / "reference_results"


def make_finding(id_: str, verdict: Verdict, **changes: Any) -> Finding:
    """Return a finding; `changes` are fields of the finding, or of its claim."""
    claim: dict[str, Any] = {
        "id": id_,
        "text": id_.split("/", 1)[1].replace("/", ": "),
        "source": "arXiv 2503.16430 v1, table 3",
        "scale": "paper",
        "recipe": "tokenbridge reproduce-table3 tokenbridge-l",
    }
    claim |= {key: changes.pop(key) for key in list(changes) if key in Claim.model_fields}
    return Finding(claim=Claim(**claim), verdict=verdict, why=changes.pop("why", "because"), **changes)


def make_audit() -> Audit:
    """Return an audit with every verdict, intervals, effects and strings that want escaping."""
    tiny = results.read(REFERENCE / "tiny" / "results.json")
    tolerance = Tolerance(relative=0.03, absolute=0.005, reason=f"spread over seeds {NASTY}")
    findings = (
        make_finding(
            "table3/tokenbridge-l/fid",
            "within doubt",
            value=1.76,
            metric="FID-50K",
            tolerance=tolerance,
            measured=1.80,
            interval=(1.75, 1.86),
            evidence=1,
            support=("at tiny scale: the order of the systems holds (19.7 >= 2)", NASTY),
        ),
        make_finding("table3/tokenbridge-l/is", "reproduced", value=294.8, metric="IS-50K", measured=295.1, evidence=1),
        make_finding("table3/tokenbridge-h/fid", "not run", value=1.55, metric="FID-50K", needs=("tokenbridge-h",)),
        make_finding("table3/maskgit/fid", "not applicable at this scale", value=6.18, not_applicable=NASTY),
        make_finding(
            "table2e/1024-4/parameters",
            "not reproduced",
            text=NASTY,
            why=NASTY,
            source=NASTY,
            recipe=NASTY,
            unit="<b>",
            scale="counted",
            value=65e6,
            measured=80_793_600,
            tolerance=Tolerance(relative=0.01, reason=LONG),
        ),
        make_finding("table2e/1024-6/parameters", "reproduced", scale="counted", value=-3, measured=-3, text=LONG),
        make_finding("text/lossless", "reproduced", scale="tiny", trend="ptq-lossless", support=(LONG,), evidence=0),
    )
    effects = (
        Effect(
            discrepancy=Discrepancy(
                id="first-element", text=NASTY, source="https://github.com/YuqingWang1029/TokenBridge."
            ),
            rows=(Row(id="discrepancies/first", label=NASTY, metrics={"FID-digits": 0.05}),),
            checks={"share of tokens that change": 0.0123, NASTY: 2.0},
            evidence=0,
        ),
        Effect(discrepancy=Discrepancy(id="temperature", text="0.96", source=LONG, not_measured="no weights")),
    )
    provenance = tiny.provenance.model_dump()
    evidence = (
        Evidence(
            file="runs/tiny/results.json",
            sha256="a" * 64,
            scale="tiny",
            rows=(*tiny.rows, Row(id="table9/nasty", label=NASTY, metrics={}, not_run=NASTY)),
            trends=tuple(tiny.trends),
            provenance=provenance,
        ),
        Evidence(
            file=f"{NASTY}/{LONG}/results.json",
            sha256="b" * 64,
            scale="paper",
            rows=(),
            trends=(),
            provenance=provenance | {"command": NASTY, "dirty": True, "settings": {NASTY: [NASTY, LONG]}},
        ),
    )
    return Audit(
        made="2026-11-24T03:00:00+00:00",
        commit="0" * 40,
        dirty=True,
        versions={"python": "3.11.7", "torch": NASTY},
        findings=findings,
        effects=effects,
        evidence=evidence,
    )


class Page(HTMLParser):
    """What the tests ask of a page: its elements with their attributes, its headings, its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.raw: list[str] = []  # of style and script
        self._inside: str | None = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        (self.raw if self._inside in ("style", "script") else self.text).append(data)

    def attributes(self, name: str) -> list[str]:
        return [value for _, attributes in self.elements if (value := attributes.get(name)) is not None]


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    runs = folder / "run"
    runs.mkdir()
    stored = REFERENCE / "tiny" / "samples-tokenbridge-64.png"
    shutil.copy(stored, runs)
    with Image.open(stored) as picture:
        picture.rotate(180).save(runs / "samples-parallel-64.png")
        picture.rotate(90).save(runs / "samples-my-own.png")
    path = folder / "index.html"
    write_page(make_audit(), path, reference=REFERENCE, runs=runs)
    return path


@pytest.fixture(scope="module")
def html(page_path: Path) -> str:
    return page_path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


# Structure


def test_every_claim_is_an_anchor_once_and_every_inner_link_leads_somewhere(page: Page) -> None:
    ids = Counter(page.attributes("id"))
    assert not [name for name, count in ids.items() if count > 1]
    audit = make_audit()
    assert {finding.claim.id for finding in audit.findings} <= ids.keys()
    assert {f"discrepancy/{effect.discrepancy.id}" for effect in audit.effects} <= ids.keys()
    inner = [unquote(link[1:]) for link in page.attributes("href") if link.startswith("#")]
    assert len(inner) > len(audit.findings)
    assert set(inner) <= ids.keys()
    assert not [label for label in page.attributes("aria-labelledby") if label not in ids]


def test_nothing_is_loaded_from_outside(page: Page, html: str) -> None:
    assert all(address.startswith("data:image/webp;base64,") for address in page.attributes("src"))
    outer = [
        (tag, attributes["href"])
        for tag, attributes in page.elements
        if (attributes.get("href") or "#")[0] != "#" and tag != "a"
    ]
    assert outer == [("link", "data:,")]
    style_and_script = "".join(page.raw)
    assert "http" not in style_and_script
    assert "@import" not in style_and_script
    assert not re.search(r"url\((?!#)", html)
    assert not re.search(r'\b(?:srcset|poster|data|action)="', html)
    assert len(html.encode()) < 3_000_000


def test_strings_are_escaped(page: Page, html: str) -> None:
    assert NASTY not in html
    assert html.count("<script>") == 1
    assert sum(tag == "script" for tag, _ in page.elements) == 1
    assert "{{" not in re.sub(r"\{\{ braces \}\}", "", html)
    text = "".join(page.text)
    # text, why, source, recipe, tolerance, support, not run, label, ...: as they were written
    assert text.count(NASTY) >= 15
    assert "<b>" in text


def test_headings_are_in_order_and_pictures_are_described(page: Page) -> None:
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    pictured = [attributes for tag, attributes in page.elements if tag == "img" and attributes.get("src")]
    assert len(pictured) >= 6
    assert all(len(attributes.get("alt") or "") > 20 for attributes in pictured)
    drawn = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert all(a.get("aria-hidden") == "true" or len(a.get("aria-label") or "") > 20 for a in drawn)


def test_headings_without_evidence_or_claims(tmp_path: Path) -> None:
    empty = make_audit().model_copy(update={"findings": (), "effects": (), "evidence": ()})
    write_page(empty, tmp_path / "index.html", reference=tmp_path)
    text = " ".join("".join(Page((tmp_path / "index.html").read_text(encoding="utf-8")).text).split())
    assert "Of 0 numbers, published or counted from official code, 0 were measured" in text
    assert "no grids of samples" in text
    assert "no training logs" in text


def test_verdicts_are_named_and_counted(page: Page) -> None:
    text = " ".join("".join(page.text).split())
    for verdict in CLAIM_VERDICTS:
        assert verdict in text
    claims = [a for tag, a in page.elements if tag == "details" and (a.get("class") or "").startswith("claim")]
    assert len(claims) == len(make_audit().findings)
    assert "published 1.76" in text
    assert "measured here 1.800" in text
    assert "the order of the systems holds (19.7 >= 2)" in text


def test_summary_says_what_was_not_measured() -> None:
    sentences = summary(make_audit().findings)
    assert sentences == [
        "Of 6 numbers, published or counted from official code, 4 were measured here: 2 at the paper's own scale "
        "(published weights, ImageNet) and 2 by counting, arithmetic or comparison with the official code's settings, "
        "which needs no trained weights.",
        "About the others nothing is said: 1 not run, 1 not applicable at this scale.",
        "1 claim in words was looked at with tiny models of digits: such a result supports a trend, never a number of "
        "the paper.",
    ]


def test_paper_tables_have_the_papers_shape() -> None:
    table2e, table3 = paper_tables(make_audit().findings)
    assert list(table3.rows) == ["tokenbridge-l", "tokenbridge-h", "maskgit"]
    assert table3.columns == {"fid": "fid", "is": "is"}
    assert table3.cells["tokenbridge-l", "is"].measured == 295.1
    assert ("maskgit", "is") not in table3.cells
    assert table2e.title.startswith("Table 2e")


def test_columns_are_named_by_what_most_claims_say() -> None:
    texts = ("16 levels: ms (± 1.85)", "32 levels: ms (± 0.57)", "64 levels: time")
    (table,) = paper_tables([make_finding(f"table5/{i}/ms", "not run", text=text) for i, text in enumerate(texts)])
    assert table.columns == {"ms": "ms"}
    assert list(table.rows.values()) == ["16 levels", "32 levels", "64 levels"]


def test_table_4_is_a_list() -> None:
    (table,) = paper_tables([make_finding("table4/training/beta-1", "reproduced", text="AdamW's beta 1", value=0.9)])
    assert table.rows == {"training/beta-1": "AdamW's beta 1"}
    assert list(table.columns) == ["value"]


def test_failures_of_the_gate_are_shown(tmp_path: Path) -> None:
    red = make_audit().model_copy(update={"failures": (f"table3/x is worse: {NASTY}",)})
    write_page(red, tmp_path / "index.html", reference=REFERENCE)
    text = "".join(Page((tmp_path / "index.html").read_text(encoding="utf-8")).text)
    assert "The gate is red" in text
    assert f"table3/x is worse: {NASTY}" in text


def test_tables_of_small_scale_are_those_of_the_recipes() -> None:
    tiny = make_audit().evidence[0]
    stand_in = tiny.model_copy(update={"scale": "stand-in: no result"})
    (shown,) = small_tables((stand_in, tiny, tiny.model_copy(update={"scale": "paper"})))
    assert shown[:2] == (1, tiny)
    assert [row.label for row in shown[2]["table2a"]] == ["parallel", "autoregressive"]


def test_values_are_formatted_as_published() -> None:
    words = make_finding("table4/training/precision", "not reproduced", scale="counted", check="x", measured=0.0)
    assert (claimed(words), measured(words)) == ("in words", "false")
    size = make_finding("table3/l/params", "not run", text="L: parameters", unit="parameters", value=486e6)
    assert (claimed(size), measured(size)) == ("486,000,000", "–")
    time = make_finding("table5/l/ms", "reproduced", text="L", unit="ms", value=52.42, measured=51.0)
    assert (claimed(time), measured(time)) == ("52.42\N{NO-BREAK SPACE}ms", "51\N{NO-BREAK SPACE}ms")
    precision = make_finding("table3/l/precision", "reproduced", metric="precision-50K", value=0.8, measured=0.801)
    assert (claimed(precision), measured(precision)) == ("0.80", "0.801")


def test_bars_and_strips() -> None:
    doubt, same = make_audit().findings[0], make_audit().findings[5]
    drawn = bar(doubt)
    assert drawn is not None
    assert drawn.zero == 0
    assert (drawn.claimed, drawn.measured) == pytest.approx((100 * 1.76 / 1.86, 100 * 1.80 / 1.86), abs=1e-3)
    near = strip(doubt)
    assert near is not None
    assert near.interval is not None
    assert near.tolerance[0] + near.tolerance[1] == pytest.approx(100)
    assert near.tolerance[0] < 50 < near.measured < near.interval[1] < 100
    assert strip(same) is None  # equal, without tolerance: nothing to tell apart
    negative = bar(same)
    assert negative is not None
    assert (negative.zero, negative.claimed) == (100, 0)
    assert bar(make_finding("text/words", "not run")) is None
    assert bar(make_finding("table3/maskgit/fid", "not run", value=6.18)) is None


def test_source_links_papers_and_addresses() -> None:
    linked = source("see arXiv:2503.16430, <b> and https://example.org/a?b=1&c=2.")
    assert '<a href="https://arxiv.org/abs/2503.16430" rel="noreferrer">arXiv:2503.16430</a>, &lt;b&gt;' in linked
    assert '<a href="https://example.org/a?b=1&amp;c=2" rel="noreferrer">' in linked
    assert linked.endswith("</a>.")


def test_pictures_of_a_run_stand_beside_the_reference(tmp_path: Path) -> None:
    stored, own = tmp_path / "stored", tmp_path / "own"
    for folder, colour in ((stored, 10), (own, 200)):
        folder.mkdir()
        Image.new("RGB", (8, 8), (colour, 0, 0)).save(folder / "samples-b.png")
        Image.new("RGB", (8, 8)).save(folder / "samples-a.png")
    Image.new("RGB", (8, 8)).save(own / "samples-tokenbridge-1.png")
    first, same, differs = pictures(stored, own)
    assert (first.name, first.reference is None, first.own is None) == ("tokenbridge-1", True, False)
    assert (same.name, same.same, same.own) == ("a", True, None)
    assert (differs.name, differs.same) == ("b", False)
    assert differs.reference != differs.own


def test_a_picture_that_cannot_be_read_is_left_out_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored, own = tmp_path / "stored", tmp_path / "own"
    for folder in (stored, own):
        folder.mkdir()
    Image.effect_noise((64, 64), 50).save(stored / "samples-cut.png")
    (own / "samples-cut.png").write_bytes((stored / "samples-cut.png").read_bytes()[:1000])
    (own / "samples-text.png").write_text("<svg onload='alert(1)'/>")
    (own / "samples-sparse.png").touch()
    os.truncate(own / "samples-sparse.png", 2**33)
    os.mkfifo(own / "samples-pipe.png")
    (own / "samples-device.png").symlink_to("/dev/zero")
    Image.new("1", (8000, 8000)).save(own / "samples-bomb.png")
    Image.new("RGB", (8, 8)).save(own / "samples-good.png")
    found = {picture.name: picture for picture in pictures(stored, own)}
    assert set(found) == {"cut", "good"}
    assert (found["cut"].own, found["cut"].same) == (None, False)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 6
    for name in ("cut", "text", "sparse", "pipe", "device", "bomb"):
        assert sum(f"samples-{name}.png" in line for line in said) == 1
    assert all(line.startswith("The page leaves out a picture of the run: ") for line in said)


def test_control_and_direction_characters_do_not_reach_the_page(tmp_path: Path) -> None:
    steering = "\x1b[31m\x07\x00\u202e\u2066\ud800"
    finding = make_finding("table3/a/fid", "not run", why=f"because {steering}", text=f"text {steering}")
    write_page(make_audit().model_copy(update={"findings": (finding,)}), tmp_path / "a", reference=REFERENCE)
    page = (tmp_path / "a").read_text(encoding="utf-8")
    assert "because �[31m�" in page
    assert not set(steering) & set(page) - set("[31m")


def test_pictures_are_lossless_where_small() -> None:
    path = REFERENCE / "tiny" / "samples-tokenbridge-64.png"
    with Image.open(path) as image:
        content = base64.b64decode(data_uri(image).partition(",")[2])
    assert len(content) < path.stat().st_size
    with Image.open(path) as stored, Image.open(io.BytesIO(content)) as shown:
        assert shown.convert("RGB").tobytes() == stored.convert("RGB").tobytes()


def test_same_audit_same_page(tmp_path: Path, html: str) -> None:
    for name in ("a", "b"):
        write_page(make_audit(), tmp_path / name, reference=REFERENCE)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("Debian's chromium is not installed")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def open_page(browser: Any, page_path: Path) -> Iterator[Any]:
    """Return a function that opens the page at a fragment; afterwards nothing was loaded, and nothing complained."""
    complaints: list[str] = []
    requests: list[str] = []
    contexts = []

    def open_(fragment: str = "", width: int = 1280, **settings: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 800}, **settings)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(page_path.as_uri() + fragment)
        return tab

    yield open_
    for context in contexts:
        context.close()
    assert complaints == []
    assert requests
    assert all(url.startswith((page_path.as_uri(), "data:")) for url in requests)


@pytest.mark.parametrize("width", [390, 1280])
def test_page_fits_its_window(open_page: Any, width: int) -> None:
    tab = open_page(width=width)
    tab.evaluate("document.querySelectorAll('details').forEach(fold => { fold.open = true; })")
    assert tab.evaluate("document.documentElement.scrollWidth") == width


def test_deep_link_unfolds_its_claim_in_a_folded_group(open_page: Any) -> None:
    finding = "text/lossless"
    tab = open_page(f"#{finding}")
    claim = tab.locator(f"[id='{finding}']")
    assert claim.get_attribute("open") is not None
    assert claim.locator(".why").is_visible()
    assert 0 <= claim.bounding_box()["y"] < 800
    # by a link inside the page, into a claim that a filter hides
    tab.locator("label", has=tab.locator("#filter-not-run")).click()
    other = tab.locator("[id='table2e/1024-4/parameters']")
    assert not other.is_visible()
    tab.locator("#paper-table2e + .scroll td.here a").first.click()
    other.locator(".why").wait_for(state="visible")


def test_filter_shows_one_verdict(open_page: Any) -> None:
    tab = open_page()
    verdicts = Counter(finding.verdict for finding in make_audit().findings)
    for verdict in CLAIM_VERDICTS:
        tab.check(f"#filter-{verdict.replace(' ', '-')}", force=True)
        assert tab.locator(".claim:visible").count() == verdicts[verdict]
    tab.check("#filter-all", force=True)
    assert tab.locator(".claim:visible").count() == len(make_audit().findings)


def test_filter_and_contents_work_without_script(open_page: Any) -> None:
    tab = open_page(java_script_enabled=False)
    assert not tab.locator("#theme").is_visible()
    assert not tab.locator("#compare").is_visible()
    tab.check("#filter-within-doubt", force=True)
    assert tab.locator(".claim:visible").count() == 1
    tab.locator(".claim:visible > summary").click()
    assert tab.locator(".claim:visible .why").is_visible()


def test_light_and_dark(open_page: Any) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    tab = open_page(color_scheme="light")
    light = tab.evaluate(background)
    tab.click("#theme")
    dark = tab.evaluate(background)
    assert dark != light
    assert open_page(color_scheme="dark").evaluate(background) == dark
    tab.click("#theme")
    assert tab.evaluate(background) == light


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_keeps_its_contrast(open_page: Any, scheme: str) -> None:
    """WCAG 2.1 AA: 4.5 for text, in both schemes."""
    tab = open_page(color_scheme=scheme)
    colours = tab.evaluate(
        """() => {
        const probe = document.body.appendChild(document.createElement("i")), style = getComputedStyle(probe);
        return Object.fromEntries(["paper", "raised", "mark", "ink", "muted", "link"].map(name => {
          probe.style.color = `var(--${name})`; return [name, style.color.match(/\\d+/g).map(Number)]; })); }"""
    )
    for text in ("ink", "muted", "link"):
        for ground in ("paper", "raised", "mark"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)


def contrast(a: list[int], b: list[int]) -> float:
    """Contrast of two sRGB colours as WCAG 2.1 defines it."""

    def luminance(colour: list[int]) -> float:
        linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_compare_slider_shows_two_grids(open_page: Any) -> None:
    tab = open_page()
    left, right = tab.locator("#compare img").all()
    assert left.get_attribute("src") != right.get_attribute("src")
    assert "parallel" in right.get_attribute("alt")
    tab.locator("#compare input").fill("80")
    assert (
        tab.evaluate("getComputedStyle(document.querySelectorAll('#compare img')[1]).clipPath")
        == "inset(0px 0px 0px 80%)"
    )


def test_print_unfolds_everything_on_white(open_page: Any) -> None:
    tab = open_page(color_scheme="dark")
    tab.emulate_media(media="print")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.locator("[id='table3/maskgit/fid'] .why").is_visible()
    content = tab.pdf(format="A4")
    assert content.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", content)) >= 4
    tab.emulate_media(media="screen")
    assert not tab.locator("[id='table3/maskgit/fid'] .why").is_visible()
