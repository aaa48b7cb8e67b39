"""Commands beside training: python -m tools.NAME.

    audit   statistics of preference files, before anything is trained
    bench   checks and speed on one GPU, in a single command of less than eight minutes
    peers   speed and losses beside TRL and transformers, each in an environment of its own
    score   rewards of the answers in a file, by a reward model of a finished run
    speed   cost of a training step of each kind; speed beside TRL and transformers
"""
