"""mpl side by side with a hand-written loop, Keras's `fit` and Orbit.

    python -m experiments.benchmarks --out=runs/bench

writes results.json and ratios.png to the folder, and prints tables with the ratios and
the goals. `works` says what is trained, `systems` who trains it, `worker` runs one of
them in a process of its own, `measure` times the workers, `goals` judges, and `report`
shows.
"""
