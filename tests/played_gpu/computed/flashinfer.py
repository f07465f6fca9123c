"""There, so that it is found; what is called in its place is ``fake_flashinfer``."""
