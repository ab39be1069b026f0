"""Names that transformers imports."""

import enum


class InterpolationMode(enum.Enum):
    NEAREST_EXACT = "nearest-exact"
    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"
