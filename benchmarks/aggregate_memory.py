"""Peak memory of ``fedexlora aggregate`` as adapters grow from 5 to 50.

Adapters of the shape of Llama-3.2-3B, all linear layers, with random factors on the disk. Each
aggregation runs in a process of its own; its peak is what the system reports for it.

    python benchmarks/aggregate_memory.py --folder /path/with/space [--rank 8] [--counts 5,50]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYERS = 28
SHAPES = {
    "self_attn.q_proj": (3072, 3072),
    "self_attn.k_proj": (1024, 3072),
    "self_attn.v_proj": (1024, 3072),
    "self_attn.o_proj": (3072, 3072),
    "mlp.gate_proj": (8192, 3072),
    "mlp.up_proj": (8192, 3072),
    "mlp.down_proj": (3072, 8192),
}
CODE = (
    "import sys, resource; from fedexlora.cli.main import app;"
    "app(sys.argv[1:], standalone_mode=False);"
    "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
)


def store(folder: Path, seed: int, rank: int, layers: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for name, (d_out, d_in) in SHAPES.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, d_in, generator=generator)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(d_out, rank, generator=generator)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "task_type": "CAUSAL_LM"}
    config["target_modules"] = [name.split(".")[1] for name in SHAPES]
    config["base_model_name_or_path"] = "3b"
    (folder / "adapter_config.json").write_text(json.dumps(config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--counts", default="5,50")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--more", default="", help="options of aggregate, e.g. '--rank 16'")
    chosen = parser.parse_args()
    counts = [int(x) for x in chosen.counts.split(",")]
    sites = [chosen.folder / f"site-{i}" for i in range(max(counts))]
    for i, site in enumerate(sites):
        if not site.exists():
            store(site, i, chosen.rank, chosen.layers)
    peaks = {}
    for count in counts:
        out = chosen.folder / "mean"
        shutil.rmtree(out, ignore_errors=True)
        start = time.perf_counter()
        words = ["aggregate", *map(str, sites[:count]), "--out", str(out), *chosen.more.split()]
        done = subprocess.run(
            [sys.executable, "-c", CODE, *words], capture_output=True, text=True, check=True
        )
        peaks[count] = int(done.stdout.split("peak ")[1]) * 1024
        size = (out / "adapter_model.safetensors").stat().st_size
        print(
            f"{count} adapters of rank {chosen.rank}: peak {peaks[count] / 1e6:.0f} MB, "
            f"{time.perf_counter() - start:.0f} s, result {size / 1e6:.0f} MB",
            flush=True,
        )
    low, high = min(counts), max(counts)
    print(f"peak of {high} over that of {low}: {peaks[high] / peaks[low]:.2f}")
    shutil.rmtree(chosen.folder / "mean", ignore_errors=True)


if __name__ == "__main__":
    main()
