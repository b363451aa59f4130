"""DyDiLA and DyDi-LiT in JAX: linear diffusion transformers for TPU and GPU pods."""

__version__ = "0.1.0"
