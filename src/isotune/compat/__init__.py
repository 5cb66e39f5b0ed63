"""Every patch on a library and every use of its private members: one file a library, each with version and reason."""
