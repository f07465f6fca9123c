"""Actors as processes: how they run, are watched and restarted, die with their supervisor, and join."""
