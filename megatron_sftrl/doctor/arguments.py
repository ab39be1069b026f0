"""The options of `sftrl doctor`, apart from what carries them out: the command line loads nothing heavy."""

from __future__ import annotations

import argparse


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """Add them to the parser of the command."""
    parser.add_argument("what", choices=("loss",), help="what is examined")
    parser.add_argument("--loss", metavar="NAME", help="registered name; not needed for a file of one loss")
    parser.add_argument(
        "--module", action="append", default=[], metavar="FILE", help="file of your own losses (repeatable)"
    )
    parser.add_argument(
        "--option", action="append", default=[], metavar="key=value", help="of the loss, e.g. beta=5.0"
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="PROPERTY", help="look at this one (repeatable)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the step that is drawn (0)")
    parser.add_argument(
        "--timeout", type=float, default=30.0, metavar="S", help="seconds for a layout of several ranks (30)"
    )
