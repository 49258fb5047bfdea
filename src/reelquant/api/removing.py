"""What is taken out of a float model for good. The verb is a few calls into the layers below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reelquant.api.asked import in_memory, verb

if TYPE_CHECKING:
    from reelquant._progress import Progress
    from reelquant.models.condition import Prompts
    from reelquant.removal import Dropped


@verb(in_memory)
def drop_blocks(
    pipe: Any,
    blocks: int | Sequence[int] = 1,
    *,
    choose: str = "measured",
    prompts: Prompts | None = None,
    calls: int = 64,
    iterations: int = 300,
    rate: float = 3e-4,
    motion: float = 1.0,
    seed: int = 0,
    work: str | Path | None = None,
    progress: Progress | Literal[False] | None = None,
    **call: Any,
) -> Dropped:
    """Drop transformer blocks of a float pipeline in place, and train the others to give what the denoiser gave; see docs/removal.md.

    The result is a float pipeline with a smaller number of blocks in its config: save it with ``pipe.save_pretrained``, or quantize it.

    Args:
        pipe: a float pipeline with one denoiser, whose blocks are a chain.
        blocks: how many to drop, or the numbers of those to drop.
        choose: which, if their numbers are not given: ``measured`` drops those without which held-out outputs change least, one after the
            other; ``shallow`` those behind the first block; ``deep`` those before the last.
        prompts: texts or conditions whose calls are recorded; by default the pipeline's own or general video prompts.
        calls: calls of the denoiser to record, a quarter of which is held out.
        iterations: steps of training, one recorded call each; 0 for none.
        rate: learning rate of Adam, which falls to zero.
        motion: weight of the differences of neighbouring frames beside the output.
        seed: of the recorded clips and the order of training.
        work: a folder that keeps what is done, so that the same call goes on where one was stopped; remove it when the pipeline is saved.
        progress: hears how far the run is; by default bars in a terminal or a notebook, False for none.
        call: arguments of the pipeline call (``num_inference_steps``, ``num_frames``, ``height`` ...), and conditions.

    Returns:
        Which blocks are gone, and the error on held-out calls without them and after training.

    Raises:
        ReelQuantError: if the denoiser is quantized, has no chain of blocks, or its config does not say how many there are; the pipeline
            is as it was.

    Example:
        >>> pipe = reelquant.open_pipeline("tiny-dit")
        >>> reelquant.drop_blocks(pipe, 1).error
        >>> reelquant.quantize(pipe, "qvd-w8a8")
    """
    from reelquant.removal import drop
    from reelquant.removal.distill import Distillation

    how = Distillation(iterations, rate, motion, seed)
    texts = [prompts] if isinstance(prompts, str) else prompts
    return drop(
        pipe,
        blocks,
        choose=choose,
        prompts=texts,
        calls=calls,
        how=how,
        seed=seed,
        work=None if work is None else Path(work),
        progress=progress or None,
        **call,
    )
