"""Readers of published workload files, each chosen by the shape of the file's first record."""
