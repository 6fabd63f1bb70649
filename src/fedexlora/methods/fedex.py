"""FedEx-LoRA: average the factors and give the residual to the frozen weight.

Singhal, Ponkshe and Vepakomma, "FedEx-LoRA: Exact Aggregation for Federated and Efficient
Fine-Tuning of Large Language Models", ACL 2025, arXiv:2410.09432, eq. 9-16. The paper weights
clients equally; here the weights are the clients' numbers of training examples.
"""

from fedexlora.algebra import assignment
from fedexlora.methods.method import Method

FEDEX = Method(
    name="fedex",
    title="FedEx-LoRA",
    paper="arXiv:2410.09432 (ACL 2025)",
    sends="up A and B; down mean A, mean B and the residual in factors",
    keeps="residual, exactly, in the frozen weight",
    exact=True,
    trained=("A", "B"),
    assignment=assignment.mean,
    remainder=assignment.keep,
    stored="products",
)
