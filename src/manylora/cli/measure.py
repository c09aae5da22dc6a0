"""`manylora bench`: measurements, each beside its baseline and its ceiling."""

from typing import Any

import typer

from manylora.bench.first_token.config import FirstTokenConfig
from manylora.bench.image.config import ImageBenchConfig
from manylora.bench.kernels.config import KernelsConfig
from manylora.bench.serve.config import ServeBenchConfig
from manylora.bench.steps.config import StepsConfig
from manylora.bench.text.config import BenchConfig
from manylora.cli.fields import command, value_of


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        help="Measure, beside the base alone, the peers and the machine's ceilings.", no_args_is_help=True
    )
    app.add_typer(group, name="bench")

    @command(group, "text", BenchConfig)
    def text(**values: Any) -> None:
        """Time the text engine. The last line printed is one JSON object.

        Example:

            manylora bench text --model smollm2-135m-instruct --adapters 128 --requests 128 --peer transformers,peft
        """
        from manylora.bench.text.command import bench_text

        bench_text(BenchConfig(**value_of(BenchConfig, values)))

    @command(group, "kernels", KernelsConfig)
    def kernels(**values: Any) -> None:
        """Time every kernel beside its twin in torch and the machine. The last line printed is one JSON object.

        Example:

            manylora bench kernels --kernels shrink,expand --lora 512:32:64,32:32:8
        """
        from manylora.bench.kernels.command import bench_kernels

        bench_kernels(KernelsConfig(**value_of(KernelsConfig, values)))

    @command(group, "steps", StepsConfig)
    def steps(**values: Any) -> None:
        """Time decode steps over batch, context and rank, with a line through each. The last line printed is JSON.

        Example:

            manylora bench steps --dtype int8 --batch 1,8,64
        """
        from manylora.bench.steps.command import bench_steps

        bench_steps(StepsConfig(**value_of(StepsConfig, values)))

    @command(group, "first-token", FirstTokenConfig)
    def first_token(**values: Any) -> None:
        """Time first tokens on adapters never read before, and on warm ones. The last line printed is one JSON object.

        Example:

            manylora bench first-token --model smollm2-135m-instruct --dtype int8
        """
        from manylora.bench.first_token.command import bench_first_token

        bench_first_token(FirstTokenConfig(**value_of(FirstTokenConfig, values)))

    @command(group, "image", ImageBenchConfig)
    def image(**values: Any) -> None:
        """Judge few-step pictures: distance to real ones, prompt accuracy. The last line printed is one JSON object.

        Example:

            manylora bench image --table sweep --base pipeline/ --judge judge/ --data held_out/
        """
        from manylora.bench.image.command import bench_image

        bench_image(ImageBenchConfig(**value_of(ImageBenchConfig, values)))

    @command(group, "serve", ServeBenchConfig)
    def serve(**values: Any) -> None:
        """Send S-LoRA's load to a server, open loop. The last line printed is one JSON object.

        Examples:

            manylora bench serve --model smollm2-135m-instruct --policies fcfs,cluster,fair,slo --load 0.5,1,2

            manylora bench serve --model smollm2-135m-instruct --url http://localhost:8000 --adapters 4 --rate 2
        """
        from manylora.bench.serve.command import bench_serve

        bench_serve(ServeBenchConfig(**value_of(ServeBenchConfig, values)))
