"""The iterative framework: members, predictions, NC set, relabelling, training, and again.

    settings.py   what a run can be told       recipe.py      read from YAML
    checks.py     what cannot work             records.py     what is done, and with what
    networks.py   the networks                 checkpoints.py weights and state on disk
    batches.py    images, targets, groups      steps.py       one step's losses
    engine.py     one training, on Lightning   predict.py     softmax of every image
    stages.py     files to files               loop.py        stages in order: ``genkl_ext.run``
    plan.py       what a run would take

Each knows only those before it.
"""
