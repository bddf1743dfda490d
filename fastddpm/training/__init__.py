"""Training: data sets as tensors, the trainer, and the command ``fastddpm train``."""
