"""The errors that a user can mend."""

from __future__ import annotations

import pytest

from tokenbridge.utils.errors import UserError, reading


@pytest.mark.parametrize("error", [KeyError("arr_0"), RuntimeError(""), MemoryError(), EOFError(), AssertionError("a")])
def test_whatever_goes_wrong_with_a_foreign_file_names_the_file(error: Exception) -> None:
    with (
        pytest.raises(UserError, match=r"x\.npz cannot be read as an archive: ") as caught,
        reading("x.npz", "an archive"),
    ):
        raise error
    assert caught.value.__cause__ is error


def test_missing_files_and_sentences_of_our_own_pass() -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no file x\.npz") as missing, reading("x.npz", "an archive"):
        raise FileNotFoundError(2, "No such file")
    assert isinstance(missing.value, UserError)
    with pytest.raises(UserError, match=r"^A sentence\.$"), reading("x.npz", "an archive"):
        raise UserError("A sentence.")
    with pytest.raises(KeyboardInterrupt), reading("x.npz", "an archive"):
        raise KeyboardInterrupt
