"""The recipe of the embedded translator: from sentence pairs to a model that reads and writes in one sequence."""
