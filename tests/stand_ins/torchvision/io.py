"""Names that transformers imports."""


class ImageReadMode: ...


def decode_image() -> None: ...
