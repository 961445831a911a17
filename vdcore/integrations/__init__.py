"""vdcore inside the models of others: diffusers first, adapters for other hosts beside it.

Every adapter changes the modules that it is given, and nothing else of the host: two models, one of them swapped, live
side by side.
"""
