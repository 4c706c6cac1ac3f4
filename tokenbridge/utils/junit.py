"""JUnit XML, which CI services show. This project writes it for its verdicts, and reads that of pytest."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from tokenbridge.utils.text import plain

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

Result = Literal["failure", "error", "skipped"]


@dataclass(frozen=True)
class Case:
    """A test case. If it has no result, it passed."""

    classname: str
    name: str
    result: Result | None = None
    message: str = ""
    kind: str = ""  # the kind of failure
    text: str = ""  # the details of the result, or the output of a case that passed
    properties: dict[str, str] = field(default_factory=dict)  # by name


@dataclass(frozen=True)
class Suite:
    """Test cases that belong together."""

    name: str
    cases: Sequence[Case]
    attributes: dict[str, str] = field(default_factory=dict)  # time, timestamp


def to_xml(name: str, suites: Iterable[Suite]) -> str:
    """Return suites as JUnit XML. What XML cannot hold, and what steers a terminal, is replaced."""
    root = ET.Element("testsuites", name=plain(name))
    for suite in suites:
        results = [case.result for case in suite.cases]
        counts = {
            "tests": str(len(results)),
            "failures": str(results.count("failure")),
            "errors": str(results.count("error")),
            "skipped": str(results.count("skipped")),
        }
        element = ET.SubElement(root, "testsuite", {"name": plain(suite.name), **counts, **suite.attributes})
        for case in suite.cases:
            test = ET.SubElement(element, "testcase", classname=plain(case.classname), name=plain(case.name))
            if case.properties:
                properties = ET.SubElement(test, "properties")
                for key, value in case.properties.items():
                    ET.SubElement(properties, "property", name=plain(key), value=plain(value))
            if case.result is not None:
                result = ET.SubElement(test, case.result, message=plain(case.message))
                result.text = plain(case.text) or None
                if case.kind:
                    result.set("type", plain(case.kind))
            elif case.text:
                ET.SubElement(test, "system-out").text = plain(case.text)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode")


def read_failed(path: Path | str) -> list[str]:
    """Return the tests in pytest's `--junitxml` (of its family xunit1) that failed or could not be run.

    The names are those that pytest takes: "benchmarks/test_speed.py::test_head[64]".
    """
    cases = ET.parse(path).iter("testcase")  # noqa: S314  pytest wrote it
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    return ["::".join(filter(None, (case.get("file"), case.get("name")))) for case in bad]
