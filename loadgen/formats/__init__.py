"""Readers of published workload files; the fields of a file's first record decide which reader is used."""
