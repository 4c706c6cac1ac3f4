"""Foreign text (names of files, labels and sentences of other people's files), made safe to show."""

from __future__ import annotations

import re

_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and newline: they move the cursor and color a terminal
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # they turn the direction of the text that follows
    "\u2028\u2029"  # line ends that only some programs see
    "\ud800-\udfff\ufffe\uffff]"  # halves of characters, and what XML 1.0 cannot hold (section 2.2)
)


def plain(text: str) -> str:
    """Return text in which every character that steers a terminal or a page, or that XML cannot hold, is replaced.

    Tabs and newlines stay. Each replaced character becomes "�" (U+FFFD), so that its place can be seen.
    """
    return _UNSAFE.sub("�", text)
