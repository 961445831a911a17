"""Context parallelism for models of diffusers: several processes share the frames of a clip.

``mesh``: which processes. ``call``: a call of a model, from the whole clip to this rank's frames and back. ``layers``:
what mixes frames besides attention, or counts them. ``models``: which models are served, and what of their arguments
has frames.
"""
