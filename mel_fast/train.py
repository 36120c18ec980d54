"""Meta-Experience Learning, the whole algorithm:

torchrun -m mel_fast.train                                   # the embedded world, on any machine
torchrun --nproc-per-node=8 -m mel_fast.train --config configs/mel_qwen3_4b.yaml
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from transformers.utils.logging import disable_progress_bar

from mel_fast.config import parse_arguments
from mel_fast.distributed import leave
from mel_fast.elastic import arguments_of, remember_refusal
from mel_fast.errors import EngineError, InputError, LaunchError, OutputError
from mel_fast.plan import plan
from mel_fast.run import Run
from mel_fast.setup import open_run


def train(run: Run) -> None:
    run.publish(version=run.steps_done)
    if run.steps_done == 0:
        run.evaluate_when_due()
    while run.steps_done < run.config.run.steps:
        episodes = run.collect()  # rollouts -> verdicts -> contrast -> reflection -> replay
        batch = run.build_batch(episodes)  # advantages, streams, weights over global denominators
        metrics = run.update(batch)  # packed micro-batches -> J_RLVR + R_MEL in one pass -> AdamW
        run.publish(version=run.steps_done + 1)
        run.observe(episodes, batch, metrics)
        run.evaluate_when_due()
        run.checkpoint_when_due()
    run.finish()


def main(arguments: Sequence[str] | None = None) -> int:
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    disable_progress_bar()  # transformers' own; ours shows the steps
    try:
        arguments = arguments_of(sys.argv[1:] if arguments is None else arguments)  # torchrun may have restarted us
        options, config = parse_arguments(arguments, "mel_fast.train")
        if options.dry_run:
            text = config.to_yaml() + "\n" + plan(config)
            if rank == 0:
                print(text)
            return 0
        with open_run(config, options.resume) as run:
            train(run)
    except (InputError, EngineError, LaunchError, OutputError) as error:
        print(f"error: {error}" if rank == 0 else f"error (rank {rank}): {error}", file=sys.stderr)
        if not isinstance(error, InputError):
            return 1
        remember_refusal(error)  # what is wrong with the input, no restart will mend
        return 2
    return 0


if __name__ == "__main__":
    status = main()
    leave()
    sys.exit(status)
