"""FedEx-LoRA without our abstractions: the rounds of a run again, in one file read downwards.

Clients i = 1..K train the same adapter (A, B) on their own rows; p_i is client i's share of all
rows. Averaging the factors, as FedIT does, is not averaging the updates. What it lacks is the
residual R (arXiv:2410.09432, Sec. 3.2), which goes to the frozen weight, times s = alpha / r:

    A = sum_i p_i A_i        B = sum_i p_i B_i        R = sum_i p_i (B_i - B)(A_i - A)
    sum_i p_i B_i A_i  =  B A + R                     W = W0 + s (R of all rounds)

    python examples/flat_round.py runs/quickstart runs/flat    # writes an adapter and compares it
"""

import hashlib
import json
import sys
import tempfile
import tomllib
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from flwr_datasets.partitioner import DirichletPartitioner
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

transformers.logging.set_verbosity_error()
run, out = map(Path, sys.argv[1:])
recipe = tomllib.loads((run / "recipe.toml").read_text())
task, split, lora = recipe["task"], recipe["partition"], recipe["lora"]
training = {k: v for k, v in recipe["training"].items() if k not in ("schedule", "device")}
seed, source = recipe["federation"]["seed"], recipe["model"]["source"]
if source.startswith("package:"):
    package, _, inside = source.removeprefix("package:").partition("/")
    source = Path(find_spec(package).origin).parent / inside
tokenizer = transformers.AutoTokenizer.from_pretrained(source)
pad = transformers.DataCollatorWithPadding(tokenizer)

# The rows, and who has which: a Dirichlet draw of labels for each client.
lines = (Path(recipe["data"]["source"]) / "train.jsonl").read_text().splitlines()
table = Dataset.from_list([json.loads(line) for line in lines])
labels = sorted(set(table[task["label"]]))
draw = split["alpha"], split["min_rows"]
partitioner = DirichletPartitioner(split["clients"], task["label"], *draw, seed=seed)
partitioner.dataset = table


def tokens(row):
    most = {"truncation": True, "max_length": task["max_length"]}
    found = tokenizer(row[task["text"]], return_token_type_ids=False, **most)
    return {**found, "labels": labels.index(row[task["label"]])}


shares = [partitioner.load_partition(i) for i in range(split["clients"])]
shares = [share.map(tokens, remove_columns=share.column_names) for share in shares]
rows = [len(share) for share in shares]  # p_i = rows[i] / sum(rows)


def new_base():
    transformers.set_seed(seed)
    kind = transformers.AutoModelForSequenceClassification
    return kind.from_pretrained(source, num_labels=len(labels))


# The model: W is frozen; A, B and the new classifier are trained.
base = new_base()
transformers.set_seed(seed)
model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", **lora))
trained = {name: x for name, x in model.named_parameters() if x.requires_grad}
layers = [name.removesuffix(".lora_A.default.weight") for name in trained if ".lora_A." in name]
a_of, b_of = ({x: f"{x}.lora_{side}.default.weight" for x in layers} for side in "AB")
W = {x: model.get_submodule(x).base_layer.weight for x in layers}
W0 = {x: W[x].detach().cpu().double() for x in layers}
s = lora["lora_alpha"] / lora["r"]
R = {x: [] for x in layers}  # of every round so far, as factors
version = {name: x.detach().double() for name, x in trained.items()}  # what a round starts from
how = {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
how |= {"remove_unused_columns": False, "train_sampling_strategy": "group_by_length"}


def average(A_i, B_i):
    """A, B and the factors of R, which are sent in float32, from one client after the other.

    A client with a share p of the rows up to it adds (1 - p) p (B_i - B)(A_i - A) to the residual
    of those rows, where A and B are the means before it.
    """
    A, B, n, left, right = A_i[0], B_i[0], rows[0], [], []
    for a, b, m in zip(A_i[1:], B_i[1:], rows[1:]):
        dA, dB, p = a - A, b - B, m / (n + m)
        left.append((dB * (n * p)).float() / sum(rows))
        right.append(dA.float())
        A, B, n = A + dA * p, B + dB * p, n + m
    return A, B, (torch.cat(left, 1).double(), torch.cat(right).double())


for round_ in range(1, recipe["federation"]["rounds"] + 1):
    sent = []
    for i, share in enumerate(shares):
        for name, x in trained.items():
            x.data.copy_(version[name])
        digest = hashlib.sha256(f"{seed}/{round_}/client-{i:02d}".encode()).digest()
        order = int.from_bytes(digest[:4], "little") % 2**31  # of dropout and of rows
        with tempfile.TemporaryDirectory() as folder:
            own = {"seed": order, "data_seed": order, **how, **training}
            own = transformers.TrainingArguments(folder, **own)
            loss = transformers.Trainer(model, own, pad, share).train().training_loss
        print(f"round {round_}, client {i}: loss {loss:.4f}")
        sent.append({name: x.detach().cpu().double() for name, x in trained.items()})
    version = {name: sum(n * c[name] for n, c in zip(rows, sent)) / sum(rows) for name in trained}
    for x in layers:
        A, B, factors = average([c[a_of[x]] for c in sent], [c[b_of[x]] for c in sent])
        version |= {a_of[x]: A, b_of[x]: B}
        R[x].append(factors)
        W[x].data.copy_(W0[x] + s * sum(left @ right for left, right in R[x]))

# On the untouched base an adapter of a higher rank is the final model: s (B A + R of all rounds).
tensors = {name: x.float() for name, x in version.items()}
for x in layers:
    left, right = zip(*R[x])
    tensors[a_of[x]] = torch.cat([version[a_of[x]], *right]).float()
    tensors[b_of[x]] = torch.cat([version[b_of[x]], *left], 1).float()
high = {"r": len(tensors[a_of[x]]), "lora_alpha": s * len(tensors[a_of[x]])}
LoraConfig(task_type="SEQ_CLS", **{**lora, **high}).save_pretrained(out)
short = {name.replace(".modules_to_save", "").replace(".default", ""): name for name in tensors}
save_file({key: tensors[name] for key, name in short.items()}, out / "adapter_model.safetensors")


def update(folder):
    adapted = PeftModel.from_pretrained(new_base(), folder).double()
    heads = {name: adapted.get_parameter(name) for name in trained if ".lora_" not in name}
    return heads | {x: adapted.get_submodule(x).get_delta_weight("default") for x in layers}


ours, theirs = update(out), update(run / "adapter")
gap = {x: float((ours[x] - theirs[x]).norm() / theirs[x].norm()) for x in theirs}
worst = max(gap, key=gap.get)
print(f"from the run's adapter: at most {gap[worst]:.1e} of an update ({worst})")
sys.exit(not gap[worst] <= 1e-6)
