"""The methods of 45 neural-network papers, each one small module: ``nnlib.<part>.<slug>``.

``import nnlib`` is cheap and does not import torch; import the module you need.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("nnlib")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
