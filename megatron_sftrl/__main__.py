"""`python -m megatron_sftrl ...` is `sftrl ...`, for torchrun."""

from megatron_sftrl.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
