"""Pre-training of large vision transformers with parallel low-rank adapters (LTE, arXiv 2402.16828)."""

__version__ = "0.1.0"
