"""The one error a user of ragsr is meant to read."""


class InputError(ValueError):
    """Input that cannot be used: the message says what came, what is allowed and what to do.

    The command line prints the message alone and exits with status 2. Being a `ValueError`, it needs no special
    treatment from library users.
    """
