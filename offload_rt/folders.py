"""Where this package keeps things. No torch here."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where what can be made again is kept; `OFFLOAD_RT_CACHE` moves it."""
    root = os.environ.get("OFFLOAD_RT_CACHE")
    if root:
        return Path(root).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("offload-rt")
