"""In float64 the tokens are equal always: the tiny model, random prompts and mixtures, every way of serving them."""

import random
from collections.abc import Iterator

from manylora.text import SamplingParams
from points import Line
from tests.text.engines import engine, expect

PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def lines() -> Iterator[Line]:
    draw = random.Random(0)
    cases = []
    for number in range(48):
        prompt = [draw.randrange(256) for _ in range(draw.randint(1, 40))]
        names = draw.sample("abcde", number % 4)
        cases.append((prompt, {name: round(draw.uniform(-0.5, 1.5), 3) for name in names}))
    wanted = [expect(prompt, mixture) for prompt, mixture in cases]
    base = [expect(prompt, None) for prompt, _ in cases]
    changed = sum(w != b for w, b, (_, m) in zip(wanted, base, cases, strict=True) if m)
    for name, settings in (
        ("one batch", {}),
        ("no prefix cache", {"prefix_caching": False}),
        ("a pool of few pages", {"num_pages": 40}),
    ):
        with engine(**settings) as served:
            done = served.generate([p for p, _ in cases], PARAMS, [m for _, m in cases])
            stats = served.stats()
        equal = sum(c.token_ids == w for c, w in zip(done, wanted, strict=True))
        yield Line(
            f"float64, tiny model, {name}",
            f"{equal} of {len(cases)} equal ({changed} differ from the base; {stats.num_preemptions} preemptions)",
            "all",
            equal == len(cases) and changed > 30,
        )
