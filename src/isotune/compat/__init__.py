"""Private members of libraries that isotune depends on: one file a library, with the version and the reason."""
