"""Every setting of ``cluster.toml``: what it may be, how files are read, and what memserve makes of it on this machine."""
