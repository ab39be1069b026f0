"""In place of torchvision, for imports alone: vLLM's Qwen3.5 of text lies in one file with that of images.

PyPI's torchvision is compiled for CUDA; beside a torch for the CPU its import fails ("operator
torchvision::nms does not exist"), and vLLM's with it. Nothing in here is ever called.
"""

__version__ = "0.28.0"
