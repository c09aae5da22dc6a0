"""Measures when mixtures break SmolLM2-135M-Instruct, and how well `manylora inspect` foresees it.

    python scripts/break_curve.py --adapters examples/adapters

Runs three sets of mixtures, each against the held-out paragraphs below and against the probes of `inspect`: "curve",
on which the thresholds of models/verdict.py were chosen, and the random "mild" and "strong", which only check them.
Rows are kept in docs/data/break_curve.json as they are measured, and a killed run goes on where it stopped. About 15
minutes on two cores. scripts/break_curve_report.py makes the tables and the plot of docs/diagnosis.md from the rows.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from manylora.lora.adapter import Adapter
from manylora.lora.diagnose import BaseNorm, diagnose_weights
from manylora.lora.formats import load_peft
from manylora.lora.synthetic import synthetic_adapter
from manylora.models.base_norms import base_norms
from manylora.models.llama import Llama
from manylora.models.loading import load_model
from manylora.models.probe import Text, probe
from manylora.models.probe_texts import PROBE_TEXTS
from manylora.models.side_by_side import SideBySide
from manylora.models.sites import base_sites
from manylora.models.tokenizer import load_tokenizer

MODEL = "smollm2-135m-instruct"
TRAINED = ("json", "pirate", "sql", "headline")
CURVE_SEED, RANDOM_SEED, STRONG_SEED, NUM_RANDOM = 1, 2, 3, 36
CURVE_STRENGTH = 0.1
"""Of the synthetic adapters that the curve goes on with: relative norms of 2 %, the trained ones have 0.6 to 1.4 %."""

Row = dict[str, Any]
"""What was measured of one mixture, as the data file holds it."""

DATA = Path(__file__).parent.parent / "docs/data/break_curve.json"

HELD_OUT = (
    "The ferry leaves the harbour every morning at half past seven and reaches the island before nine. In winter, "
    "when the sea is rough, it often stays in port for several days.",
    "Bread is made from flour, water, salt and yeast. The dough has to rest in a warm place until it has doubled in "
    "size, and only then does it go into the oven.",
    "My grandfather kept bees behind the house. He wore no gloves, and he told us that bees can feel whether a person "
    "is calm or afraid.",
    "A glacier is a river of ice that moves very slowly. As it slides down the valley it carries stones with it, and "
    "where it melts it leaves them behind.",
    "The meeting was moved to Thursday because two members of the committee were ill. Please bring the report and "
    "be ready to answer questions about the budget.",
    "Trees grow a new ring each year. In a dry year the ring is thin, in a wet year it is wide, and so the trunk keeps "
    "a record of the weather.",
    "When the light went out, nobody said a word. Then somebody found a candle, and for the rest of the evening we "
    "told each other stories.",
    "The old mill by the stream was turned into a school. Children now learn to read in the room where flour was "
    "once ground.",
)


class Case(NamedTuple):
    """One mixture to measure."""

    group: str
    adapters: Sequence[Adapter]
    weights: Sequence[float]

    @property
    def key(self) -> str:
        terms = (f"{a.name}:{w}" for a, w in zip(self.adapters, self.weights, strict=True))
        return f"{self.group} {'+'.join(terms)}"


def curve_cases(trained: Sequence[Adapter], sites: dict[str, tuple[int, int]]) -> Iterator[Case]:
    """More and more adapters, all of one weight: the trained ones first."""
    others = [synthetic_adapter(sites, n, CURVE_SEED, strength=CURVE_STRENGTH) for n in range(8)]
    for weight, counts in {
        1.0: (1, 2, 3, 4, 6, 8, 12),
        0.5: (1, 2, 3, 4, 6, 8, 12),
        1.5: (1, 2, 3, 4),
    }.items():
        for count in counts:
            yield Case("curve", [*trained, *others][:count], [weight] * count)


def random_cases(
    group: str,
    trained: Sequence[Adapter],
    sites: dict[str, tuple[int, int]],
    *,
    seed: int,
    num_adapters: tuple[int, int],
    weights: tuple[float, float],
) -> Iterator[Case]:
    """Some of the trained and of synthetic adapters of all strengths, at random weights. Trained ones are likelier."""
    draw = random.Random(seed)
    others = []
    for number in range(12):
        strength = 0.02 * 15 ** draw.random()  # 0.02 to 0.3
        others.append(synthetic_adapter(sites, 100 + number, seed, strength=strength))
    for _ in range(NUM_RANDOM):
        chosen = draw.sample([*trained, *trained, *others], draw.randint(*num_adapters))
        distinct = list({adapter.name: adapter for adapter in chosen}.values())
        yield Case(group, distinct, [round(draw.uniform(*weights), 2) for _ in distinct])


class Bench:
    """The model, the texts, and the base's own held-out loss."""

    def __init__(self, model: Llama, probes: list[Text], held_out: list[Text]) -> None:
        self.model, self.probes, self.held_out = model, probes, held_out
        self.norms: dict[str, BaseNorm] = base_norms(model)
        self.base_loss = self.loss([], [])

    def loss(self, adapters: Sequence[Adapter], weights: Sequence[float]) -> float:
        """Mean loss of the held-out paragraphs, in nats a token."""
        logits = SideBySide(self.model, adapters).logits(self.held_out, [list(weights)])[0]
        total, begin = 0.0, 0
        for text in self.held_out:
            rows = logits[begin : begin + len(text) - 1].log_softmax(dim=-1)
            total -= float(rows.gather(1, torch.tensor(text[1:])[:, None]).sum())
            begin += len(text)
        return total / sum(len(text) - 1 for text in self.held_out)

    def measure(self, case: Case) -> Row:
        result = probe(self.model, self.probes, case.adapters, case.weights)
        weights = diagnose_weights(case.adapters, case.weights, self.norms)
        return {
            "key": case.key,
            "group": case.group,
            "weights": {a.name: w for a, w in zip(case.adapters, case.weights, strict=True)},
            "held_out_rise": round(self.loss(case.adapters, case.weights) - self.base_loss, 4),
            "probe": _rounded({**asdict(result), "parts": [asdict(part) for part in result.parts]}),
            "relative_norm": _rounded(weights.relative),
            "max_relative_norm": _rounded(weights.max_relative),
            "max_cosine": _rounded(max((abs(pair.cosine) for pair in weights.pairs), default=0.0)),
        }


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(of) for key, of in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(of) for of in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def measure_all(roots: Sequence[Path], file: Path) -> None:
    """Measure what `file` has not yet, and write it after each mixture."""
    trained = [load_peft(next(root / name for root in roots if (root / name).is_dir())) for name in TRAINED]
    identities = {adapter.name: adapter.identity[:16] for adapter in trained}
    kept = json.loads(file.read_text()) if file.exists() else {}
    if kept.get("adapters") != identities:
        kept = {"model": MODEL, "adapters": identities, "rows": []}
    done = {row["key"] for row in kept["rows"]}
    model, tokenizer = load_model(MODEL), load_tokenizer(MODEL)
    sites = base_sites(model.config)
    cases = [
        *curve_cases(trained, sites),
        *random_cases("mild", trained, sites, seed=RANDOM_SEED, num_adapters=(1, 4), weights=(-0.5, 1.5)),
        *random_cases("strong", trained, sites, seed=STRONG_SEED, num_adapters=(2, 5), weights=(-1.0, 2.5)),
    ]
    missing = [case for case in cases if case.key not in done]
    if not missing:
        return
    tokens = [[tokenizer(text)["input_ids"] for text in texts] for texts in (PROBE_TEXTS, HELD_OUT)]
    bench = Bench(model, *tokens)
    kept["base_loss"] = round(bench.base_loss, 4)
    for number, case in enumerate(missing, 1):
        row = bench.measure(case)
        kept["rows"].append(row)
        file.parent.mkdir(exist_ok=True)
        lines = ",\n  ".join(json.dumps(row) for row in kept["rows"])
        head = json.dumps({key: value for key, value in kept.items() if key != "rows"})
        file.write_text(f'{head[:-1]}, "rows": [\n  {lines}\n]}}\n')
        print(
            f"{number}/{len(missing)} {row['held_out_rise']:+.3f} {row['probe']['mixture']} {case.key}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--adapters", type=Path, action="append", required=True, help="folder of the trained ones"
    )
    parser.add_argument("--data", type=Path, default=DATA)
    options = parser.parse_args()
    measure_all(options.adapters, options.data)


if __name__ == "__main__":
    main()
