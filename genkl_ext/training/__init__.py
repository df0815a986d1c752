"""The iterative framework: members, predictions, NC set, relabelling, training, and again.

    settings.py   what a run can be told         recipe.py     read from YAML, checked
    ranks.py      the processes of one job       networks.py   the networks
    batches.py    images, targets, groups        steps.py      one step's losses
    engine.py     one training, on Lightning     checkpoints.py  weights and state on disk
    predict.py    softmax of every image         records.py    what is done, and with what
    stages.py     files to files                 loop.py       stages in order: ``genkl_ext.run``
    plan.py       what a run would take

Each knows those before it in: settings, recipe | ranks, networks, checkpoints | batches, steps |
engine, predict | records, stages | loop, plan.
"""
