"""Evidence: does each method do what it claims? Claims tested with the mechanism switched off, and a verdict computed.

An experiment is one file of `experiments/`: its data, model and arms. Everything else is shared, and read in the order
`experiment` (what an experiment is), `training`, `tuning`, `runner`, `store`, `statistics`, `report`, `figures`.
"""
