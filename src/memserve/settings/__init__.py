"""The settings of ``cluster.toml``: their rules, how files are read, and what is derived on this machine."""
