"""Installs the package megatron-sftrl and the command sftrl."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
FOUND = re.search(r'__version__ = "(.+)"', (HERE / "megatron_sftrl/__init__.py").read_text(encoding="utf-8"))
assert FOUND, "megatron_sftrl/__init__.py holds the version"
README = HERE / "README.md"

setup(
    name="megatron-sftrl",
    version=FOUND.group(1),
    description="SFT that prepares for RL: GIFT, PEAR and CurioSFT on Megatron-Core",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_sftrl", "megatron_sftrl.*"]),
    package_data={"megatron_sftrl": ["py.typed"], "megatron_sftrl.config": ["presets/*.yaml"]},
    python_requires=">=3.11",
    # tests/unit/test_dependencies.py holds this list against what is imported.
    install_requires=[
        # torch.mm(out_dtype=) came with 2.8; 2.13 is what vLLM 0.32 pins, and what is tested.
        "torch>=2.8,<2.14",
        "safetensors",
        "megatron-core>=0.16.1,<0.20",  # 0.17 and later need Python 3.12
        "psutil",
        "numpy",
        "transformers>=5.16.1,<5.20",
        "tokenizers",
        "sentencepiece",
        "datasets",
        "pyarrow",
        "pydantic>=2.7",
        "PyYAML",
        "rich",
        "wandb",
        "jinja2",
        "reasoning-gym",
        "math-verify>=0.9",
        "latex2sympy2_extended",
        "sympy",
    ],
    extras_require={
        # By slurm/install.sh: its extension is compiled for the torch that is there. From 2.20 on it asks for
        # cuDNN 9.12, and torch 2.13 brings 9.20.
        "gpu": ["transformer-engine[pytorch]>=2.20,<3"],
        "vllm": ["vllm>=0.32,<0.33"],
        "mistral": ["mistral-common>=1.13"],  # a tokenizer.path with a tekken.json
        "trackio": ["trackio"],
        "mlflow": ["mlflow-skinny>=3.17", "sqlalchemy", "alembic", "sqlparse"],
        "report": ["matplotlib"],  # sftrl report, and the quick start
        "test": ["pytest", "pytest-timeout", "pytest-xdist", "ruff", "pyright", "tensorboard", "matplotlib"],
    },
    entry_points={"console_scripts": ["sftrl = megatron_sftrl.__main__:start"]},
)
