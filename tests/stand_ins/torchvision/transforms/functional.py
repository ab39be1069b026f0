"""Names that transformers imports."""


def pil_to_tensor() -> None: ...
