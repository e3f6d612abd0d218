"""Batches of real long-range tasks, and the trainer that runs them."""

from gradkernels.tasks.text import CharacterModel, Characters, characters
from gradkernels.tasks.trainer import Trainer

__all__ = ["CharacterModel", "Characters", "Trainer", "characters"]
