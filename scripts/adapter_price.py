"""What adapters of eight bits and KV of two bytes cost in answers: python scripts/adapter_price.py [MODEL]

The four example adapters, on held-out questions of their tasks. Each is asked for every token of the right answer,
given what stands before it: perplexity of the answers, and how often the most likely token is the same as without
rounding. A right token that is not among the 20 most likely counts as the last of them, in every way alike.
"""

import math
import random
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ADAPTERS = ROOT / "examples" / "adapters"
sys.path.insert(0, str(ADAPTERS))

from make_data import TASKS, distinct_rows  # noqa: E402

from manylora import Engine, EngineConfig, Library, SamplingParams, load_model, load_tokenizer  # noqa: E402
from manylora.models.demo_model import DEMO_MODEL  # noqa: E402

NUM_ROWS = 20
"""Questions of each task."""

TOP = 20
WAYS = {
    "as stored": {},
    "int8 adapters": {"adapter_dtype": "int8"},
    "bfloat16 KV": {"kv_cache_dtype": "bfloat16"},
    "both": {"adapter_dtype": "int8", "kv_cache_dtype": "bfloat16"},
}

Judged = list[tuple[int, float]]
"""Of each token of the answers: the most likely one, and how likely the right one is (its logarithm)."""


def judge(engine: Engine, task: str | None, chats: list[tuple[list[int], list[int]]]) -> Judged:
    prompts = [prompt + answer[:i] for prompt, answer in chats for i in range(len(answer))]
    right = [token for _, answer in chats for token in answer]
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=TOP, ignore_eos=True)
    judged = []
    for completion, token in zip(
        engine.generate(prompts, params, [task] * len(prompts)), right, strict=True
    ):
        (at,) = completion.logprobs
        found = dict(at.top)
        judged.append((completion.token_ids[0], found.get(token, min(found.values()))))
    return judged


def perplexity(judged: Judged) -> float:
    return math.exp(-sum(logprob for _, logprob in judged) / len(judged))


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else DEMO_MODEL
    tokenizer, model = load_tokenizer(name), load_model(name)
    chats = {task: _chats(tokenizer, task) for task in TASKS}
    answers: dict[tuple[str, str], Judged] = {}
    for way, settings in WAYS.items():
        with Engine(model, tokenizer, Library(ADAPTERS), EngineConfig(**settings)) as engine:
            for task, rows in chats.items():
                answers[way, task] = judge(engine, task, rows)
                if way == "as stored":
                    answers["no adapter", task] = judge(engine, None, rows)
    for task in TASKS:
        exact = answers["as stored", task]
        print(f"{task}: {len(exact)} tokens, perplexity {perplexity(exact):.3f}, ", end="")
        print(f"without the adapter {perplexity(answers['no adapter', task]):.3f}")
        for way in list(WAYS)[1:]:
            other = answers[way, task]
            same = sum(a == b for (a, _), (b, _) in zip(exact, other, strict=True)) / len(exact)
            change = perplexity(other) / perplexity(exact) - 1
            print(f"  {way}: perplexity {change:+.2%}, most likely token equal {same:.1%}")


def _chats(tokenizer: object, task: str) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) in tokens of held-out questions."""
    make_row, _ = TASKS[task]
    rows = distinct_rows(make_row, random.Random(1), NUM_ROWS, True)
    made = []
    for question, answer in rows:
        asked = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(  # type: ignore[attr-defined]
            asked, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        made.append((list(prompt), list(tokenizer.encode(answer))))  # type: ignore[attr-defined]
    return made


if __name__ == "__main__":
    main()
