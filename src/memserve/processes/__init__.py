"""Actors as processes: how one runs, is watched, dies with its supervisor, is restarted, and joins a running cluster."""
