"""The one exception that a user is meant to read."""


class LowRankError(Exception):
    """Something the user gave cannot be used; the message says what, where and what to do.

    The command line prints it as one line and exits with code 2.
    """
