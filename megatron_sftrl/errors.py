"""The class of errors that a user can fix; all others are failures: the job is restarted."""

from __future__ import annotations


class UserError(ValueError):
    """Something that the user wrote or gave and that a restart would meet again: expected, got, what to do.

    A ValueError, so that pydantic's validators collect it with the rest of a file's problems. The reverse
    does not hold: a library's ValueError says nothing about whose fault it is.
    """
