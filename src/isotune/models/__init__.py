"""Models that keep packed documents apart: attention, loss head, loading, adapters and export."""

import logging

# bitsandbytes 0.50 warns at import of an optional CPU kernel that nobody asked for; its errors still come through
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
