"""FFA-LoRA: freeze A, which all clients share, and average B.

Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024,
arXiv:2403.12313. With one A for all, the residual is zero and averaging B is exact; the price is
half of the trainable parameters.
"""

from fedexlora.algebra import assignment
from fedexlora.methods.method import Method

FFA = Method(
    name="ffa",
    title="FFA-LoRA",
    paper="arXiv:2403.12313 (ICLR 2024)",
    sends="up B; down mean B",
    keeps="nothing is left over: A is frozen and shared",
    exact=True,
    trained=("B",),
    assignment=assignment.mean,
    remainder=assignment.drop,
    stored="factors",
)
