"""Draw what runs recorded: the score by round, and how far each model is from the clients' mean.

python examples/plot_rounds.py OUT.png RUN_DIR [RUN_DIR...]
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt


def main(out, folders):
    figure, (scores, errors) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for folder in map(Path, folders):
        header = json.loads((folder / "run.json").read_text())
        records = [json.loads(x) for x in (folder / "rounds.jsonl").read_text().splitlines()]
        rounds = [record["round"] for record in records]
        headline, method = header["headline"], records[0]["method"]
        found = [(0, header["initial_metrics"]), *((r["round"], r["metrics"]) for r in records)]
        scored = [(number, metrics[headline]) for number, metrics in found if headline in metrics]
        scores.plot(*zip(*scored, strict=True), "o-", label=method)
        off = [record["certificate"]["error"] for record in records]
        (line,) = errors.semilogy(rounds, off, "o-", label=f"{method}: distance from it")
        lost = [record["deviation"] for record in records]
        note = f"{method}: what averaging the factors would lose"
        errors.semilogy(rounds, lost, "s--", color=line.get_color(), alpha=0.6, label=note)
    scores.set(xlabel="round", ylabel=headline, title="score of the global model")
    errors.set(xlabel="round", ylabel="share of the update", title="the clients' mean update")
    for axes in (scores, errors):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
