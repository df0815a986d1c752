"""``genkl finetune``: defined beside ``genkl train``, with which it shares nearly all."""

from .train import finetune as finetune
