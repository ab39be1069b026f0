"""Whose fault an error is: the user's, which a restart meets again, or one that may pass."""

from __future__ import annotations

import errno
import json

import pytest

from megatron_sftrl.errors import UserError, error_of


class OfALibrary(Exception):
    """What a binding of a Rust library raises: the number of the system's error is in the text alone."""


def wrapped(cause: BaseException) -> BaseException:
    try:
        try:
            raise cause
        except type(cause) as error:
            raise ValueError("a library says that it cannot be loaded") from error
    except ValueError as error:
        return error


@pytest.mark.parametrize("number", ["ENOENT", "EACCES", "EISDIR", "ENOTDIR", "EROFS", "ENOSPC", "EDQUOT"])
def test_a_path_its_rights_and_a_full_disk_are_the_users(number: str) -> None:
    assert type(error_of("told", OSError(getattr(errno, number), "as it says"))) is UserError


@pytest.mark.parametrize(
    "number", ["ESTALE", "EIO", "EAGAIN", "ENOMEM", "EMFILE", "ETIMEDOUT", "EHOSTDOWN", "ECONNRESET"]
)
def test_a_file_system_that_fails_is_not_also_inside_of_what_a_library_makes_of_it(number: str) -> None:
    cause = OSError(getattr(errno, number), "as it says")
    for error in (cause, wrapped(cause)):
        told = error_of("told", error)
        assert (type(told), str(told)) == (RuntimeError, "told")


def test_content_that_cannot_be_read_is_the_users() -> None:
    with pytest.raises(json.JSONDecodeError) as caught:
        json.loads("{")
    for error in (caught.value, OSError("Can't load the tokenizer"), wrapped(KeyError("x"))):
        assert type(error_of("told", error)) is UserError


def test_the_number_is_found_in_the_text_of_a_rust_library() -> None:
    assert type(error_of("", OfALibrary("Stale file handle (os error 116)"))) is RuntimeError
    assert type(error_of("", OfALibrary("No such file or directory (os error 2)"))) is UserError


def test_too_little_memory_may_pass() -> None:
    assert type(error_of("", wrapped(MemoryError()))) is RuntimeError
