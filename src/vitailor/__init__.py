"""vitailor: cut a trained Vision Transformer to a budget; get back a smaller, faster plain model."""

__version__ = "0.1.0"
