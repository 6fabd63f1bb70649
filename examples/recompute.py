"""Recompute a run's final model from what its clients sent, without fedexlora.

python examples/recompute.py RUN_DIR        # a run with --keep-updates
"""

import json
import sys
import tomllib
from pathlib import Path

from safetensors.torch import load_file


def read(folder):
    """An adapter's factors by module, B scaled, and its other tensors; all in float64."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = {k: t.double() for k, t in load_file(folder / "adapter_model.safetensors").items()}
    factors = {}
    for key in [k for k in tensors if k.endswith(".lora_A.weight")]:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = tensors.pop(key), tensors.pop(key.replace("lora_A", "lora_B"))
        fits = [
            v for k, v in config["alpha_pattern"].items() if f".{name}".endswith(f".{k.strip('^')}")
        ]
        alpha = fits[0] if fits else config["lora_alpha"]
        factors[name] = a, alpha / len(a) ** (0.5 if config["use_rslora"] else 1) * b
    return factors, tensors


run = Path(sys.argv[1])
recipe = tomllib.loads((run / "recipe.toml").read_text())
if recipe["method"].get("next_adapter", "mean") != "mean" or recipe.get("clients"):
    sys.exit("only runs whose clients all continue from the mean factors can be recomputed")
rounds = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
frozen = {}  # by module: what earlier rounds left in the frozen weight
for number, record in enumerate(rounds, start=1):
    sent = sorted((run / "updates" / f"round-{number:04d}").iterdir())
    weights = [json.loads((client / "client.json").read_text())["weight"] for client in sent]
    shares = [weight / sum(weights) for weight in weights]
    factors, others = zip(*map(read, sent))
    ideal, averaged = {}, {}
    for name in factors[0]:
        ideal[name] = sum(p * f[name][1] @ f[name][0] for p, f in zip(shares, factors))
        mean_a, mean_b = (sum(p * f[name][i] for p, f in zip(shares, factors)) for i in (0, 1))
        averaged[name] = mean_b @ mean_a
    if record["certificate"]["truncated"]:
        sys.exit("runs that truncate the remainder cannot be recomputed")
    applied = averaged if record["method"] == "fedit" else ideal
    update = {name: frozen.get(name, 0) + applied[name] for name in applied}
    frozen = {name: update[name] - averaged[name] for name in update}
heads = {name: sum(p * o[name] for p, o in zip(shares, others)) for name in others[0]}

final, final_heads = read(run / "adapter")
errors = {n: float((b @ a - update[n]).norm() / update[n].norm()) for n, (a, b) in final.items()}
errors |= {n: float((t - heads[n]).norm() / heads[n].norm()) for n, t in final_heads.items()}
worst = max(errors, key=errors.get)
print(f"{len(rounds)} rounds, {len(final)} modules, {len(heads)} other tensors recomputed")
print(f"largest relative error {errors[worst]:.1e} ({worst})")
sys.exit(errors.keys() != update.keys() | heads.keys() or not errors[worst] <= 1e-6)
