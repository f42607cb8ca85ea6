"""Optimizers of pretraining, and the learning rate that they share."""

import math

import torch

from helpers.training.settings import TrainingSettings


def learning_rate_factor(step: int, settings: TrainingSettings) -> float:
    """Linear warm-up to 1, then half a cosine down to 0."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def build_optimizers(model: torch.nn.Module, settings: TrainingSettings) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=settings.muon_lr, weight_decay=settings.weight_decay),
        torch.optim.AdamW(others, lr=settings.adamw_lr, betas=(0.9, 0.95), weight_decay=settings.weight_decay),
    ]
