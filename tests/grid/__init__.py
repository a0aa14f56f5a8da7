"""The grid: each feature with each other one, against a model that was built with the new size.

A cell of it is a model, an adapter of PEFT around it, which rows are trained at which end, a way to
call, and what is looked at. Each is right, or refused for a reason that the grid knows.

python -m tests.grid --cells 10000 --seed 0
"""
