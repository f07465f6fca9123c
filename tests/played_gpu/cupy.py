"""The part of CuPy that memserve uses, on memory that lies in files of the folder ``PLAYED_GPU``."""

import os
from pathlib import Path

from fake_cupy import fake_cupy

_made = fake_cupy(8 << 30, Path(os.environ["PLAYED_GPU"]), int(os.environ.get("PLAYED_GPUS", "1")))
cuda, uint8, ndarray = _made.cuda, _made.uint8, _made.ndarray
