"""The exception for what a user can mend: its text names key, value and way out, on one line."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input found at start-up; the command line prints its text alone and exits with 2."""
