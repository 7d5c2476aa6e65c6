"""The one exception a user is meant to read."""


class UserError(Exception):
    """Something the user can mend: the message holds the value, the expectation and the next command.

    The command line prints it as one line and exits with status 1; nothing else of the kit catches it.
    """
