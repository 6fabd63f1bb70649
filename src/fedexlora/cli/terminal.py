"""What a run looks like on a terminal: live progress, a line a round, a closing table."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import TracebackType
from typing import Self

import typer
from rich.console import Console

from fedexlora.cli.options import progress_bars
from fedexlora.cli.tables import print_blocks, print_entry
from fedexlora.cli.text import make_console, plain
from fedexlora.exchange.records import MOST_FORWARD, RoundRecord, score_text
from fedexlora.local.threads import describe_threads
from fedexlora.methods import METHODS
from fedexlora.rounds.loop import RunResult
from fedexlora.rounds.observer import Observer, RunInfo
from fedexlora.rounds.recipe import Recipe
from fedexlora.texts import printable


class JsonLines(Observer):
    """Every round's record as one line of JSON on standard output."""

    def finished_round(self, record: RoundRecord) -> None:
        """Print the record."""
        typer.echo(record.model_dump_json(ensure_ascii=True))


class Terminal(Observer):
    """A progress display while a run goes on; without a terminal, only the lines."""

    def __init__(self) -> None:
        self.console = make_console()
        self._progress = progress_bars(self.console)
        self._rounds = self._progress.add_task("preparing", total=None)
        self._work = self._progress.add_task("", total=None)
        self._info: RunInfo | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def preparing(self, what: str) -> None:
        """Show what is being prepared."""
        self._progress.update(self._work, description=what, total=None, completed=0)

    def note(self, what: str) -> None:
        """One line."""
        self.console.print(f"[yellow]note[/] {plain(what)}", soft_wrap=True)

    def passed_over(self, fault: str) -> None:
        """Say which file of the store could not be read."""
        self.console.print(f"[yellow]passed over[/] {plain(fault)}", soft_wrap=True)

    def started(self, info: RunInfo) -> None:
        """Say who takes part, and where the rounds start."""
        self._info = info
        rows, scored = info.clients.values(), info.validation_rows
        validation = f", {scored:,} validation rows" if scored else ""
        self.console.print(
            f"[bold]{METHODS[info.method].title}[/]: {len(info.clients)} clients with "
            f"{min(rows):,} to {max(rows):,} training rows{validation}; "
            f"{info.modules} adapted modules in {info.precision}, "
            f"{info.trained_parameters:,} trained parameters"
        )
        self.console.print(_place(info.device), soft_wrap=True)
        if info.finished:
            self.console.print(f"resumed after round {info.finished}")
        else:
            score = score_text(info.initial_metrics, info.headline)
            if score:
                self.console.print(f"before round 1    {info.headline} {score}")
        self._progress.update(
            self._rounds, description="rounds", total=info.rounds, completed=info.finished
        )

    def training(self, round_: int, client: str, step: int, steps: int) -> None:
        """Show a client's steps."""
        what = printable(f"round {round_}: {client} trains")
        self._progress.update(self._work, description=what, total=steps, completed=step)

    def phase(self, round_: int, what: str) -> None:
        """Show what the server does."""
        doing = f"round {round_}: server {what}s"
        self._progress.update(self._work, description=doing, total=None, completed=0)

    def evaluating(self, done: int, batches: int) -> None:
        """Show how far scoring is."""
        self._progress.update(self._work, total=batches, completed=done)

    def finished_round(self, record: RoundRecord) -> None:
        """One line for the round, and one for every client that was left out."""
        if self._info is None:
            return
        headline, certificate = self._info.headline, record.certificate
        asked = len(record.clients) + len(record.left_out)
        score = _score(record, headline)
        sampled = f"{len(record.clients)} clients  " if asked < record.registered else ""
        self.console.print(
            f"round {record.round:>3} of {self._info.rounds:<4}  {sampled}"
            f"{score}"
            f"averaging loses {record.deviation:6.2%}  "
            f"error {certificate.error:.0e}  "
            f"{sum(record.seconds.values()):.1f} s"
        )
        for client in record.left_out:
            reasons = plain("; ".join(client.reasons))
            self.console.print(f"  [yellow]left out[/] {plain(client.client)}: {reasons}")
        self._progress.update(self._rounds, completed=record.round)


def _score(record: RoundRecord, headline: str) -> str:
    """The headline of a round; where clients score, that of the version before."""
    if text := score_text(record.metrics, headline):
        return f"{headline} {text}  "
    if record.scores is None:
        return ""
    text = score_text(record.scores.metrics, headline)
    return f"version {record.scores.version} {headline} {text}  " if text else ""


def closing(result: RunResult, recipe: Recipe, report: Path | None) -> None:
    """The table at the end of a run, where adapter and report are, and what to do next."""
    console = make_console()
    _print_table(console, result, METHODS[recipe.method.name].title)
    for label, text in _verdict(result, recipe):
        print_entry(console, label, text)
    console.print(f"adapter      [bold]{plain(result.adapter)}[/]", soft_wrap=True)
    if result.best is not None and result.best.version < len(result.records):
        best, folder = result.best, result.folder / "adapter-best"
        said = f"version {best.version}, {best.metric} {best.score:.4f}: {folder}"
        print_entry(console, "best", plain(said))
    if report is not None:
        console.print(f"report       [bold]{plain(report)}[/]", soft_wrap=True)
    console.print("next", style="bold")
    for what, command in _next_commands(result, recipe):
        console.print(f"  {what}\n    {plain(command)}", soft_wrap=True)


def _print_table(console: Console, result: RunResult, title: str) -> None:
    every = result.scores()
    names = list(dict.fromkeys(name for scores in every.values() for name in scores))
    scores = [score_text(every.get(0, {}), name) for name in names]
    rows = [["start", *scores, *[""] * 5]]
    rows += [
        [
            str(record.round),
            *(score_text(every.get(record.round, {}), name) for name in names),
            f"{record.deviation:.2%}",
            f"{record.certificate.error:.1e}",
            f"{record.bytes.up / 1e6:.2f}",
            f"{record.bytes.down / 1e6:.2f}",
            f"{sum(record.seconds.values()):.1f}",
        ]
        for record in result.records
    ]
    header = ["round", *names, "averaging\nloses", "error", "MB up", "MB down", "seconds"]
    where = "the validation rows" if result.finish is None else "the clients' held-out rows"
    print_blocks(console, f"{title}, scores on {where}", header, rows)


def _place(device: str) -> str:
    threads = describe_threads()
    waiting = [f"{name}={value}" for name, value in threads["thread_waiting"].items()]
    told = plain(f" ({', '.join(waiting)})") if waiting else ""
    return (
        f"trained and scored on {plain(device)}; PyTorch's processor threads: "
        f"{threads['torch_threads']}{told}; --threads changes that"
    )


def _folding(result: RunResult) -> str:
    return f"{result.precision} weights round away what is folded into them"


def _verdict(result: RunResult, recipe: Recipe) -> list[tuple[str, str]]:
    """Whether the model was the clients' mean in every round, what averaging costs, the traffic."""
    lost = max(record.deviation for record in result.records)
    up = sum(record.bytes.up for record in result.records)
    down = sum(record.bytes.down for record in result.records)
    if result.finish is not None:
        up, down = up + result.finish.bytes.up, down + result.finish.bytes.down
    return [
        ("certificate", _certificate(result, recipe)),
        ("arithmetic", _arithmetic(result)),
        (
            "averaging",
            f"FedIT's mean of the factors would have lost up to {lost:.1%} of a round's update",
        ),
        ("traffic", f"{up / 1e6:.2f} MB up, {down / 1e6:.2f} MB down, all clients and rounds"),
    ]


def _certificate(result: RunResult, recipe: Recipe) -> str:
    rule, name = recipe.rule, recipe.method.name
    if rule.personal:
        return f"none: {name} has one model a client, and none that is that of all"
    modules = [module for record in result.records for module in record.modules]
    worst = max(modules, key=lambda module: module.error / module.allowed)
    broken = sum(not record.certificate.held for record in result.records)
    if broken:
        why = f"{name} drops the residual" if not rule.certified else _folding(result)
        off = max(record.certificate.error for record in result.records)
        return (
            f"[yellow]not exact[/]: {why}; in {broken} of {len(result.records)} rounds the model "
            f"was not the clients' mean: off by up to {off:.1%} of it"
        )
    if (added := max(module.added for module in modules)) > 0.0:
        return (
            f"[green]as stated[/]: in every round the model applied the clients' mean update and "
            f"what {name} adds to it, up to {added:.1%} of a module's update; worst module "
            f"off by {worst.error:.1e}, allowed {worst.allowed:.1e}"
        )
    if not rule.exact and rule.certified:
        left_out = max(record.certificate.truncated for record in result.records)
        return (
            f"[yellow]truncated[/], as asked: rounds left out up to {left_out:.2%} of the update "
            f"and nothing else; worst module off by {worst.error:.1e}, allowed {worst.allowed:.1e}"
        )
    return (
        f"[green]exact[/]: in every round the model applied the clients' mean update; worst "
        f"module off by {worst.error:.1e} of it, allowed {worst.allowed:.1e}"
    )


def _arithmetic(result: RunResult) -> str:
    """What the layers make of the update, as training and scoring multiply."""
    figures = [_figures(record) for record in result.records]
    worst = max((forward for forward, _ in figures), default=0.0)
    kept = [share for _, share in figures if share is not None]
    said = f"as the layers multiply, their update is off by up to {worst:.1e}"
    if kept:
        furthest = max(kept, key=lambda share: abs(share - 1.0))
        said += f"; {furthest:.1%} of the remainder comes out of them"
    modules = [module for record in result.records for module in record.modules]
    # What a method drops or truncates on purpose is no loss of the arithmetic.
    lossy = [
        m
        for m in modules
        if m.forward is not None and m.forward > MOST_FORWARD + m.allowed and m.error <= m.allowed
    ]
    holders = [record.holders for record in result.records if record.holders is not None]
    if not lossy and not any(x.forward > MOST_FORWARD for x in holders):
        return said
    if not any(module.placement == "fold" for module in lossy):
        return f"[yellow]lossy[/]: {said}"
    return f"[yellow]lossy[/]: {said}; federation.placement = 'auto' keeps it beside the weight"


def _figures(record: RoundRecord) -> tuple[float, float | None]:
    """The largest forward error of a round, and what of the remainder comes out of the layers."""
    if record.certificate.worst_forward is not None:
        return record.certificate.worst_forward, record.certificate.kept
    return (0.0, None) if record.holders is None else (record.holders.forward, record.holders.kept)


def _next_commands(result: RunResult, recipe: Recipe) -> list[tuple[str, str]]:
    # The resolved recipe: the file that the run was started from lacks what --set changed.
    recipe_word = shlex.quote(str(result.folder / "recipe.toml"))
    out = shlex.quote(str(result.folder))
    more = recipe.federation.rounds + 2
    kept = (result.folder / "updates").is_dir()
    keep = " --keep-updates" if kept else ""
    resume = f"fedexlora run {recipe_word} --out {out} --resume{keep}"
    commands = []
    if recipe.training["schedule"] == "round":  # else those that are over had other learning rates
        commands.append(("two more rounds:", f"{resume} --set federation.rounds={more}"))
    if recipe.method.name == "fedex":
        other = shlex.quote(f"{result.folder}-fedit")
        commands.append(
            (
                "the same with plain averaging:",
                f"fedexlora run {recipe_word} --out {other} --set method.name=fedit",
            )
        )
    if kept:
        commands.append(
            (
                "check the result without our code (in a checkout):",
                f"python examples/recompute.py {out}",
            )
        )
    return commands
