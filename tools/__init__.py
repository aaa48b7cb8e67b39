"""Commands beside training: python -m tools.NAME.

    audit        statistics of preference files, before anything is trained
    bench        speed beside the machine's own matrix products; beside peers; growth; checks on a
                 GPU
    compare      differences between the rows of an experiment's results, with intervals
    rewardbench  a reward model's scores on public benchmarks, which benchmark_scores.py defines
    score        rewards of the answers in a file, by a reward model of a finished run
"""
