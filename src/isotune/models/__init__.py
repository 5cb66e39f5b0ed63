"""Models that keep packed documents apart: attention, loss head, opening, adapters and merging."""

from isotune.compat.bitsandbytes import silence_import_warning

silence_import_warning()
