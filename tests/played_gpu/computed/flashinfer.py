"""An empty module, so that FlashInfer counts as installed; ``fake_flashinfer`` is called in its place."""
