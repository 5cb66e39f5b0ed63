"""Projects built on the library: each with its own data and rules. Importing this makes them known to it."""

from isotune.projects import demo, prompts  # noqa: F401
from isotune.projects.arena import recipes  # noqa: F401
