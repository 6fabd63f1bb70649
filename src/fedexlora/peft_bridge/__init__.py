"""Between PEFT's live model and the unscaled, rows-first algebra.

The only importer of peft and of transformers' models, and the one owner of the scaling and of the
orientation in which a layer stores its weight.
"""
