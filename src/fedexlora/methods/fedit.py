"""FedIT: average the factors; the residual is lost.

Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", ICASSP 2024,
arXiv:2305.05644. The mean of products is replaced by the product of means, which is inexact.
"""

from fedexlora.algebra import assignment
from fedexlora.methods.method import Method

FEDIT = Method(
    name="fedit",
    title="FedIT",
    paper="arXiv:2305.05644 (ICASSP 2024)",
    sends="up A and B; down mean A and mean B",
    keeps="nothing: the residual is lost",
    exact=False,
    trained=("A", "B"),
    assignment=assignment.mean,
    remainder=assignment.drop,
    stored="factors",
)
