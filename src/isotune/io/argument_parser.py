"""The argument parser of every command: a mistake on the command line is answered in one sentence."""

import argparse
from typing import NoReturn

from isotune.io.errors import UserError


class OneSentenceParser(argparse.ArgumentParser):
    """argparse's parser that raises a `UserError` of one sentence instead of printing the whole usage."""

    def error(self, message: str) -> NoReturn:
        """Raise argparse's message with the command that shows the help.

        Raises:
            UserError: always.
        """
        raise UserError(f"{message.removeprefix('argument ')} (see {self.prog} --help)")
