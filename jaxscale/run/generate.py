"""`generate`: continues prompts with a run's checkpoint."""

from jaxscale.launch.runtime import apply_runtime
from jaxscale.models.quantised import QuantisedConfig
from jaxscale.run.model import load
from jaxscale.run.run import Run
from jaxscale.serve.sampling import SamplingConfig


def generate(
    *,
    run: Run,
    prompts: tuple[str, ...] | str,
    max_new_tokens: int = 100,
    sampling: SamplingConfig = SamplingConfig(),
    step: int | None = None,
    tensor: int = 1,
    quantisation: QuantisedConfig | None = None,
) -> list[str]:
    """Continues prompts with a trained model, and prints each with its continuation.

    Args:
        run: the run; its mesh is that of the training and is not used.
        prompts: one or more texts.
        max_new_tokens: longest continuation, in tokens; it ends earlier where the model ends the
            document.
        sampling: how tokens are drawn.
        step: which checkpoint; the newest when None.
        tensor: devices over which the model is spread.
        quantisation: of the matrices of layers, on one device; None keeps them as they are.
    Returns:
        The continuations, without the prompts.
    Raises:
        InputError: no such checkpoint, it had another tokenizer, or a prompt is empty or too long
            for the model.
    """
    apply_runtime(run.runtime, str(run.path))
    prompts = (prompts,) if isinstance(prompts, str) else prompts
    model = load(
        run,
        step=step,
        tensor=tensor,
        quantisation=quantisation,
        prompts=prompts,
        max_new_tokens=max_new_tokens,
    )
    texts = model.generate(prompts, max_new_tokens=max_new_tokens, sampling=sampling)
    for prompt, text in zip(prompts, texts, strict=True):
        print(f"{prompt}{text}\n")
    return texts
