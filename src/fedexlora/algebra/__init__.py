"""Exact arithmetic of LoRA updates, on torch alone: unscaled, and rows first, ``(d_out, d_in)``.

Letters are the paper's (arXiv:2410.09432): client ``i`` sends ``A_i (r, d_in)`` and
``B_i (d_out, r)``; ``A`` and ``B`` are their weighted means; ``R`` is the residual. The scaling
``alpha / r`` and the orientation in which a layer stores its weight belong to ``peft_bridge``.
"""
