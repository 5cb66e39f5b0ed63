"""Projects built on the library: each with its own data and rules. Importing this makes them known to it."""

from isotune.projects.arena import kind  # noqa: F401
from isotune.projects.demo import capitals, opinions  # noqa: F401
from isotune.projects.prompts import sentence_type  # noqa: F401
