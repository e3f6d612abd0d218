"""Batches of real long-range tasks, models for them, and the trainers that run them."""

from gradkernels.tasks.generators import Adding, CopyMemory, SubjectVerb, Task, adding, copy_memory, subject_verb
from gradkernels.tasks.text import CharacterModel, Characters, characters
from gradkernels.tasks.trainer import Trainer

__all__ = [
    "Adding",
    "CharacterModel",
    "Characters",
    "CopyMemory",
    "SubjectVerb",
    "Task",
    "Trainer",
    "adding",
    "characters",
    "copy_memory",
    "subject_verb",
]
