"""`missile bench isolation`: what a neighbour costs, with shared and with disjoint colors of memory.

In two parts: working sets of chosen sizes on chosen colors (`plan`, `lab`, `run`, `results`, `table`, `plot`), and whole
models beside each other (`models*`).
"""
