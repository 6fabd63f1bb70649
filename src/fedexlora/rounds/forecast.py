"""What a recipe will take: modules, bytes, memory and disk, before anything is trained."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence
from math import prod

import psutil
import torch

from fedexlora.algebra.lowrank import LowRank, break_even
from fedexlora.exchange.forecast_records import (
    ForecastRecord,
    MemoryRecord,
    ModuleKindRecord,
    NewcomerRecord,
)
from fedexlora.exchange.sizes import held_bytes, rank_of
from fedexlora.exchange.spec import ModuleSpec
from fedexlora.local.arguments import training_arithmetic
from fedexlora.local.footprint import scoring_footprint, training_footprint, writing_footprint
from fedexlora.methods import METHODS, Rule
from fedexlora.peft_bridge.device import find_device
from fedexlora.peft_bridge.source import resolve_source
from fedexlora.peft_bridge.weightless import stored_bytes, weight_files
from fedexlora.peft_bridge.weights import is_quantised
from fedexlora.rounds.observer import Observer
from fedexlora.rounds.preparation import prepare
from fedexlora.rounds.recipe import Recipe
from fedexlora.rounds.remainders import find_remainders
from fedexlora.rounds.scoring import Scoring, scoring_arithmetic
from fedexlora.rounds.sketch import Sketch, sketch
from fedexlora.rounds.traffic import Traffic

_TURNS = ("training", "scoring", "reduction")
"""What of a process's memory is never held together."""
_SHOWN = 6
"""Rounds of which is said what a newcomer downloads."""
_WIDE = torch.float64.itemsize
_SINGLE = torch.float32.itemsize


def forecast(recipe: Recipe, name: str, observer: Observer) -> ForecastRecord:
    """Check a recipe as a run does before its first round, and reckon what it takes.

    Where the model's weights are on this machine and fit its memory, they are loaded and one step
    is taken and undone, as a run does. Nothing is written.

    Args:
        recipe: the recipe.
        name: what it is called in the record.
        observer: told of progress.

    Raises:
        InputError: what a run would refuse.
    """
    drawn = sketch(recipe, observer)
    observer.preparing("reckoning memory")
    work = _work(drawn)
    libraries = _peak_of_process()  # nothing has had numbers so far, but rows
    observer.preparing("reckoning bytes")
    clients = tuple(drawn.num_examples)
    taking_part = recipe.participation.sample(clients, recipe.federation.seed, 1)
    remainders = find_remainders(_uncut(recipe), drawn.model.spec, drawn.specs, taking_part)
    traffic = Traffic(recipe, drawn.model.spec, drawn.specs, drawn.num_examples, remainders)
    memory = _memory(drawn, traffic, libraries, work, len(taking_part))
    why_not = _why_not(recipe, memory)
    if not why_not:
        _, trainer = prepare(recipe, Observer())
        observer.preparing("rehearsing a step")
        trainer.rehearse()
    return _record(drawn, traffic, memory, name, why_not, taking_part)


def _why_not(recipe: Recipe, memory: Sequence[MemoryRecord]) -> str:
    """Why the weights are not loaded; empty if they are."""
    source = resolve_source(recipe.model.source)
    if not weight_files(source, recipe.model.revision):
        return "the model's weights are not on this machine"
    device = find_device(recipe.device)
    free = (
        torch.cuda.mem_get_info(device)[0]
        if device.type == "cuda"
        else psutil.virtual_memory().available
    )
    needed = next(x.total for x in memory if x.where == "one process")
    if needed > free:
        return f"it would take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
    return ""


def _record(
    drawn: Sketch,
    traffic: Traffic,
    memory: Sequence[MemoryRecord],
    name: str,
    why_not: str,
    taking_part: Sequence[str],
) -> ForecastRecord:
    recipe, model = drawn.recipe, drawn.model
    parameters = list(model.peft_model.parameters())
    rounds, method = recipe.federation.rounds, METHODS[recipe.method.name]
    up, down = traffic.rounds()
    first = taking_part[0]
    return ForecastRecord(
        recipe=name,
        method=method.name,
        title=method.title,
        rounds=rounds,
        rehearsed=not why_not,
        why_not=why_not,
        notes=tuple(drawn.summary.notes),
        precision=model.precision(),
        training=str(training_arithmetic(recipe.training)),
        scoring=str(scoring_arithmetic(recipe)),
        device=str(find_device(recipe.device)),
        modules=tuple(_kinds(drawn, traffic)),
        trained_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        all_parameters=sum(p.numel() for p in parameters),
        clients=dict(drawn.num_examples),
        clients_per_round=len(taking_part),
        validation_rows=0 if drawn.scoring is None else len(drawn.scoring.validation),
        exact=_exact(recipe),
        up=max(traffic.up(client) for client in taking_part),
        down=max(traffic.down(first, t - 2, t) for t in range(2, max(rounds, 2) + 1))
        if rounds > 1
        else 0,
        down_first=traffic.down(first, None, 1),
        newcomers=tuple(
            NewcomerRecord(round=t, bytes=traffic.down(first, None, t)) for t in _some(rounds)
        ),
        round_up=tuple(up),
        round_down=tuple(down),
        memory=tuple(memory),
        disk=traffic.folder(),
        truncation=_truncation(recipe),
    )


def _exact(recipe: Recipe) -> bool:
    """Whether ranks do not depend on the numbers that come out of training."""
    table = recipe.federation
    options = METHODS[recipe.method.name].options.model_validate(recipe.method.options)
    by_energy = [key for key, value in options if "energy" in key and value is not None]
    return table.robust is None and table.deadline is None and not by_energy


def _truncation(recipe: Recipe) -> str:
    options = recipe.method.options
    cut = any(x.startswith("remainder_") and v for x, v in options.items())
    if not cut and options.get("energy", 1.0) == 1.0:
        return ""
    return (
        "every round's remainder is cut, which the round's record states as a share of its update; "
        "without that a run would be exact, and send and keep more"
    )


def _uncut(recipe: Recipe) -> Rule:
    """The rule without a cut whose rank is that of the numbers: what it sends at most."""
    most = {"energy": 1.0, "remainder_energy": None}
    options = {key: most.get(key, value) for key, value in recipe.method.options.items()}
    return METHODS[recipe.method.name].rule_of(options)


def _some(rounds: int) -> list[int]:
    """The first rounds, and then twice as many each time, and the last."""
    found = [1 << i for i in range(rounds.bit_length()) if 1 << i < rounds]
    if len(found) >= _SHOWN:
        found = [1, *found[-(_SHOWN - 2) :]]
    return [*found, rounds]


def _kinds(drawn: Sketch, traffic: Traffic) -> list[ModuleKindRecord]:
    """Adapted modules that are alike, in the order of the model."""
    groups: dict[tuple[str, ModuleSpec, str], list[str]] = {}
    for module, spec in drawn.model.spec.modules.items():
        key = module.rpartition(".")[2], spec, drawn.model.placement(module)
        groups.setdefault(key, []).append(module)
    return [_kind(drawn, traffic, kind, spec, names) for (kind, spec, _), names in groups.items()]


def _kind(
    drawn: Sketch, traffic: Traffic, kind: str, spec: ModuleSpec, names: Sequence[str]
) -> ModuleKindRecord:
    name, rounds = names[0], drawn.recipe.federation.rounds
    piece = traffic.remainders.of_round(1).get(name)
    dense = (t for t, total in enumerate(traffic.totals) if rank_of(total[name]) is None)
    return ModuleKindRecord(
        kind=kind,
        count=len(names),
        d_out=spec.d_out,
        d_in=spec.d_in,
        rank=spec.rank,
        placement=drawn.model.placement(name),
        reason=_reason(drawn, name),
        piece_rank=0 if piece is None else rank_of(piece),
        break_even=break_even(spec.d_out, spec.d_in),
        total_rank=rank_of(traffic.totals[rounds][name]),
        dense_after=next(dense, None),
    )


def _reason(drawn: Sketch, name: str) -> str:
    """Why a module's remainder lives where it does."""
    asked = drawn.recipe.federation.placement
    if asked != "auto":
        return f"federation.placement = {asked!r}"
    weight = drawn.model.modules[name].weight
    if drawn.model.placement(name) == "fold":
        return "a float32 weight of its own, always multiplied in float32"
    if is_quantised(weight):
        return "the weight is quantised"
    if weight.dtype != torch.float32:
        return f"the weight is {str(weight.dtype).removeprefix('torch.')}"
    narrow = [str(x) for x in drawn.model.arithmetics if x.narrows]
    return f"it is multiplied in {narrow[0]}" if narrow else "the weight is shared with a layer"


def _memory(
    drawn: Sketch, traffic: Traffic, libraries: int, work: tuple[int, int], clients: int
) -> list[MemoryRecord]:
    """What a client, a server, and one process that is both hold at most.

    Args:
        drawn: the run.
        traffic: its versions.
        libraries: bytes of a process that has loaded them and the rows.
        work: of a step of training, and of scoring.
        clients: of a round.
    """
    recipe, model = drawn.recipe, drawn.model
    weights = sum(map(stored_bytes, model.peft_model.parameters()))
    step, score = work
    last = traffic.totals[-1]
    beside = _beside(drawn, last)
    total = held_bytes(last, torch.float64)
    reduced = max(_reduced(m, clients) for m in model.spec.modules.values())
    # The server's next version is made while that of now is held.
    reduction = {"libraries": libraries, "version": total, "reduction": total + reduced}
    holder = {"libraries": libraries, "weights": weights, "remainders": beside, "version": total}
    whole = {**holder, "training": step, "scoring": score, "reduction": total + reduced}
    server, client = reduction, {**holder, "training": step}
    if recipe.evaluation.where == "server":
        server = {**holder, "scoring": score, "reduction": total + reduced}
    elif recipe.evaluation.where == "clients":
        client["scoring"] = score
    else:
        del whole["scoring"]
    known = (("client", client), ("server", server), ("one process", whole))
    return [_turns(where, parts) for where, parts in known]


def _turns(where: str, parts: Mapping[str, int]) -> MemoryRecord:
    """Parts of which some take turns."""
    always = sum(size for name, size in parts.items() if name not in _TURNS)
    most = max(parts[name] for name in _TURNS if name in parts)
    return MemoryRecord(where=where, parts=dict(parts), total=always + most)


def _work(drawn: Sketch) -> tuple[int, int]:
    """Bytes of a step of training, and of scoring."""
    recipe = drawn.recipe
    plain = drawn
    if recipe.model.quantization is not None:
        # bitsandbytes' layers have no shapes to reckon with; their outputs are those of plain ones.
        table = recipe.model.model_copy(update={"quantization": None})
        plain = sketch(recipe.model_copy(update={"model": table}), Observer())
    model = plain.model.peft_model
    device = find_device(recipe.device)
    trained = training_footprint(model, drawn.rows, drawn.collator, recipe.training).on(device)
    if plain.scoring is None:  # clients score, if anybody does, on rows of their own
        batch, arithmetic = recipe.evaluation.batch_size, scoring_arithmetic(recipe)
        own = scoring_footprint(model, drawn.rows, drawn.collator, batch, arithmetic)
        return trained, own.on(device)
    every = (plain.scoring, *plain.scoring.sets.values())
    return trained, max(_scored(plain, own, device) for own in every)


def _scored(drawn: Sketch, scoring: Scoring, device: torch.device) -> int:
    """Bytes of scoring one set of rows."""
    model, arithmetic = drawn.model.peft_model, scoring_arithmetic(drawn.recipe)
    batch, generation = drawn.recipe.evaluation.batch_size, scoring.generation
    rows = scoring.validation
    most = scoring_footprint(model, rows, drawn.collator, batch, arithmetic).on(device)
    if generation is None:
        return most
    config = generation.config
    sequences = config.num_beams * min(config.batch_size, len(generation.prompts))
    length = max(map(len, generation.prompts)) + config.max_new_tokens
    return max(most, writing_footprint(model, sequences, length, arithmetic).on(device))


def _beside(drawn: Sketch, total: Mapping[str, LowRank]) -> int:
    """What remainders take on the model: beside the weight, or a copy of what is folded into."""
    found = 0
    for name, matrix in total.items():
        if drawn.model.placement(name) == "fold":
            found += _SINGLE * prod(matrix.shape) * (not matrix.is_zero)
        else:
            found += _SINGLE * matrix.numel
    return found


def _reduced(module: ModuleSpec, clients: int) -> int:
    """What reducing one module takes: updates widened, and the dense matrices of a fold."""
    ends = module.d_in + module.d_out
    dense = module.d_in * module.d_out
    return _WIDE * (2 * clients * module.rank * ends + 3 * dense)


def _peak_of_process() -> int:
    """The most that this process has held so far."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
