"""Before a run: whether it can work, what it will do, and what it needs of memory, time and money."""
