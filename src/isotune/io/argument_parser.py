"""A command line whose mistakes are answered in one sentence."""

import argparse
from typing import NoReturn

from isotune.io.errors import UserError


class OneSentenceParser(argparse.ArgumentParser):
    """A parser whose complaint is one sentence, as that of every other mistake, and not the whole usage."""

    def error(self, message: str) -> NoReturn:
        """Raise the complaint with where to look.

        Raises:
            UserError: always.
        """
        raise UserError(f"{message.removeprefix('argument ')} (see {self.prog} --help)")
