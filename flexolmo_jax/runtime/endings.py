"""How a command can end early without an error. Raised by training, reported by the command."""


class Interrupted(Exception):
    """The run was asked to stop, and has saved its state.

    Attributes:
      by_user: by SIGINT (Ctrl-C) and not by SIGTERM, which schedulers send.
    """

    def __init__(self, message: str, by_user: bool = False):
        super().__init__(message)
        self.by_user = by_user


class AlreadyDone(Exception):
    """The package that was asked for exists already, made by the same run."""
